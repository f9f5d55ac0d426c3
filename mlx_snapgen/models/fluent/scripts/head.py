"""Encoder's semantic head on the 32 latents. args: OUT SECONDS LR files"""
import sys,time,os,numpy as np,torch,torch.nn as nn,torch.nn.functional as F
sys.path.insert(0,'work');sys.path.insert(0,'work/int');torch.set_num_threads(int(os.environ.get('THREADS','1')))
import ae as AE
from safetensors.torch import load_file,save_file
from train.data.stickers.semantics import things_at
OUT,SECONDS,LR=sys.argv[1],float(sys.argv[2]),float(sys.argv[3])
class H(nn.Module):
    def __init__(s,W=192,blocks=4):
        super().__init__();s.inp=nn.Conv2d(32,W,1);s.blocks=nn.Sequential(*[AE.RB(W) for _ in range(blocks)]);s.out=nn.Conv2d(W,19,1)
        for b in s.blocks: nn.init.zeros_(b.conv2.weight);nn.init.zeros_(b.conv2.bias)
        nn.init.zeros_(s.out.weight);nn.init.zeros_(s.out.bias)
    def forward(s,x): return s.out(s.blocks(s.inp(x)))
if __name__=='__main__':
    val=np.load('val.npz');vl=torch.from_numpy(val['lat']).float().permute(0,3,1,2);vs=torch.from_numpy(val['sem']).float().permute(0,3,1,2)
    d=[np.load(f) for f in sys.argv[4:]];lat=torch.from_numpy(np.concatenate([x['lat'] for x in d])).permute(0,3,1,2).contiguous();sem=torch.from_numpy(np.concatenate([x['sem'] for x in d])).permute(0,3,1,2).contiguous()
    N=len(lat);net=H()
    if os.environ.get('INIT'): net.load_state_dict(load_file(os.environ['INIT']))
    mu=[p for n,p in net.named_parameters() if 'blocks' in n and p.ndim==4];ad=[p for n,p in net.named_parameters() if not('blocks' in n and p.ndim==4)]
    opt=torch.optim.Adam(ad,lr=LR*4,betas=(.9,.98));mom=[torch.zeros_like(p) for p in mu]
    W=torch.ones(19);W[10]=4;W[11:15]=6;W[8:10]=2;W[15:]=1;W=W.view(1,-1,1,1)
    ema={k:v.clone() for k,v in net.state_dict().items()}
    def evaluate():
        raw={k:v.clone() for k,v in net.state_dict().items()};net.load_state_dict(ema)
        with torch.no_grad():
            o=net(vl);e=(o-vs).square();inside=vs[:,:8].abs().amax(1)>0
            f=lambda s:(e[:,s].permute(0,2,3,1)[inside].sum()/vs[:,s].square().permute(0,2,3,1)[inside].sum()).item()
            a=things_at(o.permute(0,2,3,1).numpy());b=things_at(vs.permute(0,2,3,1).numpy());ii=b>0
            r=dict(noun=f(slice(0,8)),xy=f(slice(8,10)),size=f(slice(10,11)),color=f(slice(11,15)),ground=(e[:,15:].sum()/vs[:,15:].square().sum()).item(),right=(a//25==b//25)[ii].mean(),thing=(a==b)[ii].mean(),empty=(a[~ii]>0).mean())
        net.load_state_dict(raw);return ' '.join(f'{k} {v:.3f}' for k,v in r.items())
    from train.data.stickers.semantics import codes
    NC=torch.from_numpy(codes()[:150]).float();CEW=float(os.environ.get('CEW','.1'));ces=[];ccs=[];CC=torch.from_numpy(codes(4)).float()
    t0=time.time();step=0;B=16;rng=np.random.default_rng(0);ls=[]
    while time.time()-t0<SECONDS:
        f=(time.time()-t0)/SECONDS;lr=LR*min(1,(step+1)/60)*(1 if f<.3 else max(.02,(1-f)/.7))
        i=torch.from_numpy(rng.integers(0,N,B));x=lat[i].float();y=sem[i].float()
        with torch.autocast('cpu',torch.bfloat16): o=net(x)
        of=o.float();loss=((of-y).square()*W).mean();tc=torch.einsum('bchw,nc->bhwn',y[:,:8],NC);ins=tc.amax(-1)>7;ce=F.cross_entropy(torch.einsum('bchw,nc->bhwn',of[:,:8],NC)[ins],tc.argmax(-1)[ins]);cl=torch.einsum('bchw,nc->bhwn',of[:,11:15],CC)[ins];ct=torch.einsum('bchw,nc->bhwn',y[:,11:15],CC)[ins];ct=torch.where(ct.amax(-1)>2,ct.argmax(-1)+1,0);cc=F.cross_entropy(F.pad(cl,(1,0),value=2.),ct);ccs.append(cc.item());loss=loss+CEW*(ce+2*cc);ces.append(ce.item());opt.zero_grad();[p.grad is not None and p.grad.zero_() for p in mu];loss.backward()
        for g in opt.param_groups:g['lr']=lr*4
        opt.step()
        with torch.no_grad():
            us=[]
            for p,v in zip(mu,mom): v.mul_(.95).add_(p.grad,alpha=.05);us.append((.05*p.grad+.95*v).reshape(p.shape[0],-1))
            X=torch.stack(us);X=(X/(X.norm(dim=(1,2),keepdim=True)+1e-7)).bfloat16()
            for _ in range(5): s=X@X.mT;X=3.4445*X+(-4.775*s+2.0315*s@s)@X
            for p,u in zip(mu,X.float()): p.sub_(u.reshape(p.shape),alpha=lr*20)
            dd=min(.995,(step+1)/(step+10));ks=list(ema);sd=net.state_dict();torch._foreach_lerp_([ema[k] for k in ks],[sd[k] for k in ks],1-dd)
        ls.append(loss.item());step+=1
        if step%100==0: print(step,f'{time.time()-t0:.0f}s loss {np.mean(ls[-100:]):.4f} ce {np.mean(ces[-100:]):.2f} cc {np.mean(ccs[-100:]):.3f}',evaluate(),flush=True)
        if step%500==0: save_file(ema,OUT+'.safetensors')
    print('end',step,evaluate());save_file(ema,OUT+'.safetensors')
