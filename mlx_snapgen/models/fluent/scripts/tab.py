"""Semantic table: semantics -> 32 normalized latents. args: OUT SECONDS LR ; pools p*.npz"""
import sys,time,os,numpy as np,torch,torch.nn as nn,torch.nn.functional as F,glob
sys.path.insert(0,'work');sys.path.insert(0,'work/int');torch.set_num_threads(int(os.environ.get('THREADS','1')))
import ae as AE
from safetensors.torch import load_file,save_file
from train.data.stickers.semantics import codes
if __name__=='__main__': OUT,SECONDS,LR=sys.argv[1],float(sys.argv[2]),float(sys.argv[3])
NN=150;SIZES=list(range(32,257,32));CELLS=[(s//16)**2 for s in SIZES];START=np.concatenate([[0],np.cumsum(CELLS)[:-1]]);PAGE=sum(CELLS)
NC=torch.from_numpy(codes()[:NN]).float()
def index(sem):
    """(B,19,h,w)-> row in table (B,h,w), -1 nothing"""
    n=torch.einsum('bchw,nc->bhwn',sem[:,:8],NC);best,i=n.max(-1)
    size=(96*2.**sem[:,10]);k=(size/32).round().clamp(1,8).long()-1;m=2*(k+1)
    c=((sem[:,8]/1.7+1)/2*m-.5).round().clamp(min=0);r=((sem[:,9]/1.7+1)/2*m-.5).round().clamp(min=0)
    c=torch.minimum(c,m-1.).long();r=torch.minimum(r,m-1.).long()
    row=i*PAGE+torch.tensor(START)[k]+r*m+c
    return torch.where(best>4,row,-1)
class S(nn.Module):
    def __init__(s,D=32,W=160,blocks=3):
        super().__init__()
        s.table=nn.Embedding(NN*PAGE,D);s.inp=nn.Conv2d(D+16,W,1);s.blocks=nn.Sequential(*[AE.RB(W) for _ in range(blocks)])
        for b in s.blocks: nn.init.zeros_(b.conv2.weight);nn.init.zeros_(b.conv2.bias)
        s.out=nn.Conv2d(W,32,1);nn.init.zeros_(s.out.weight)
    def forward(s,sem):
        i=index(sem);t=s.table(i.clamp(min=0))*(i>=0)[...,None];t=t.permute(0,3,1,2)
        place=torch.cat([sem[:,:8],sem[:,11:]],1)
        return s.out(s.blocks(s.inp(torch.cat([t,place],1))))+t[:,:32]
if __name__=='__main__':
    val=np.load('val.npz');vl=torch.from_numpy(val['lat']).float().permute(0,3,1,2);vs=torch.from_numpy(val['sem']).float().permute(0,3,1,2)
    files=sys.argv[4:];d=[np.load(f) for f in files];lat=torch.from_numpy(np.concatenate([x['lat'] for x in d])).permute(0,3,1,2).contiguous();sem=torch.from_numpy(np.concatenate([x['sem'] for x in d])).permute(0,3,1,2).contiguous()
    print(lat.shape);net=S();N=len(lat)
    with torch.no_grad():
        # start: means of things with their own color on transparent ground, else of any color
        tot=torch.zeros(NN*PAGE,32);cnt=torch.zeros(NN*PAGE)
        for a in range(0,N,256):
            s=sem[a:a+256].float();i=index(s);own=(s[:,11:15].abs().amax(1)==0)&(s[:,15:].abs().amax(1)==0)
            wgt=torch.where(own,1.,.01);ok=i>=0
            tot.index_add_(0,i[ok],lat[a:a+256].float().permute(0,2,3,1)[ok]*wgt[ok][:,None]);cnt.index_add_(0,i[ok],wgt[ok])
        print('rows seen',(cnt>0).float().mean().item(),'own',(cnt>.9).float().mean().item())
        net.table.weight.copy_(tot/cnt.clamp(min=1e-6)[:,None])
    if os.environ.get('INIT'): net.load_state_dict(load_file(os.environ['INIT']))
    opt=torch.optim.Adam([{'params':[p for n,p in net.named_parameters() if n!='table.weight'],'lr':LR,'m':1},{'params':[net.table.weight],'lr':LR,'m':float(os.environ.get('TM','1'))}],betas=(.9,.98))
    ema={k:v.clone() for k,v in net.state_dict().items()}
    def evaluate():
        raw={k:v.clone() for k,v in net.state_dict().items()};net.load_state_dict(ema)
        with torch.no_grad():
            e=(net(vs)-vl).square();inside=vs[:,:8].abs().amax(1)>0;tot=vl.square()
            col=(vs[:,11:15].abs().amax(1)>0)&inside;g=(vs[:,15:].abs().amax(1)>0)&inside;own=inside&~col&~g;big=inside&(vs[:,10]>.5)
            f=lambda q:(e.permute(0,2,3,1)[q].sum()/tot.permute(0,2,3,1)[q].sum()).item()
            r=dict(all=f(inside),own=f(own),color=f(col),ground=f(g),big=f(big),empty=f(~inside))
        net.load_state_dict(raw);return ' '.join(f'{k} {v:.4f}' for k,v in r.items())
    print('start',evaluate(),flush=True);t0=time.time();step=0;B=24;rng=np.random.default_rng(0);ls=[]
    while time.time()-t0<SECONDS:
        f=(time.time()-t0)/SECONDS;lr=LR*min(1,(step+1)/100)*(1 if f<.3 else max(.02,(1-f)/.7))
        i=torch.from_numpy(rng.integers(0,N,B));x=sem[i].float();y=lat[i].float()
        loss=(net(x)-y).square().mean();opt.zero_grad();loss.backward()
        for g in opt.param_groups:g['lr']=lr*g['m']
        opt.step();ls.append(loss.item());step+=1;dd=min(.995,step/(step+9))
        with torch.no_grad():
            if step%4==0:
                ks=list(ema);sd=net.state_dict();torch._foreach_lerp_([ema[k] for k in ks],[sd[k] for k in ks],1-dd**4)
        if step%200==0: print(step,f'{time.time()-t0:.0f}s loss {np.mean(ls[-200:]):.4f}',evaluate(),flush=True)
    print('end',step,evaluate());save_file(ema,OUT+'.safetensors')
