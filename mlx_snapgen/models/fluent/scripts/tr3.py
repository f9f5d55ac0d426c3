"""Transformer training in torch. args: OUT STEPS LR; env INIT, B, K, EVERY, FALL, THREADS, SECONDS"""
import sys,time,json,os,math,torch,numpy as np
sys.path.insert(0,'work/int')
E=os.environ
torch.set_num_threads(int(E.get('THREADS','1')))
import torch.nn.functional as F
from concurrent.futures import ThreadPoolExecutor
from safetensors.torch import load_file,save_file
from mlx_snapgen.config import TransformerConfig,TextEncoderConfig
from mlx_snapgen.json_values import from_dict
from convert.pytorch.efficient_dit import EfficientDiT
from convert.pytorch.parts import TextEncoder
from mlx_snapgen.networks.text_encoders.sentencepiece import load_processor
from mlx_snapgen.networks.text_encoders.base import normalize
from train.data.stickers.scenes import training_scene,validation_scene
from train.data.stickers.vocabulary import FLUENT
from train.data.stickers.semantics import *
OUT,STEPS,LR=sys.argv[1],int(sys.argv[2]),float(sys.argv[3])
B=int(E.get('B','32'));K=8;NN=150;C=28+K
SECONDS=float(E.get('SECONDS','1e9'))
cfgs=json.load(open('start/config.json'))
c=cfgs['transformer'];c.update(patch_size=2,latent_channels=C,widths=[1.0])
net=EfficientDiT(from_dict(TransformerConfig,c),(16,16))
enc=TextEncoder(from_dict(TextEncoderConfig,cfgs['text_encoders'][0]))
class M(torch.nn.Module):
    def __init__(s):
        super().__init__();s.net,s.enc=net,enc
    def forward(s,x,t,tok,mask):
        st=s.enc(tok,mask);text,m=s.net.encode_text([(st,mask)])
        return s.net(x,t,text,m)
m=M()
init=E.get('INIT')
if init=='fluent' or init=='stickers':
    w=load_file(f'work/{init}/transformer.safetensors');own=net.state_dict()
    w={k:v for k,v in w.items() if k in own and own[k].shape==v.shape}
    print('missing',[k for k in own if k not in w])
    net.load_state_dict(w,strict=False)
    enc.load_state_dict(load_file('work/fluent/text_encoder_0.safetensors'))
    torch.nn.init.normal_(net.head.linear.weight,std=.02);torch.nn.init.zeros_(net.head.linear.bias)
    torch.nn.init.normal_(net.patch_embed.weight,std=1/math.sqrt(4*C));torch.nn.init.zeros_(net.patch_embed.bias)
elif E.get('MAP'):
    w=load_file(init);old=w['net.patch_embed.weight'];new=torch.randn(256,C,2,2)/math.sqrt(4*C)
    ho=w['net.head.linear.weight'].reshape(32,4,256,1,1);hb=w['net.head.linear.bias'].reshape(32,4);hn=torch.randn(C,4,256,1,1)*.02;bn=torch.zeros(C,4)
    for d,s_ in ((slice(0,8),slice(19,27)),(slice(8,16),slice(0,8)),(slice(28,32),slice(11,15)),(slice(32,36),slice(15,19))):
        new[:,d]=old[:,s_];hn[d]=ho[s_];bn[d]=hb[s_]
    w['net.patch_embed.weight']=new;w['net.head.linear.weight']=hn.reshape(-1,256,1,1);w['net.head.linear.bias']=bn.reshape(-1)
    m.load_state_dict(w)
else: m.load_state_dict(load_file(init))
sp=load_processor(open('start/tokenizer_0.model','rb').read())
L=32
def tokens_of(prompts):
    rows=[[sp.bos_id(),*sp.encode(normalize(p))[:L-2],sp.eos_id()] for p in prompts]
    n=max(map(len,rows))
    tok=torch.full((len(rows),n),sp.pad_id());mask=torch.zeros(len(rows),n,dtype=torch.bool)
    for i,r in enumerate(rows): tok[i,:len(r)]=torch.tensor(r);mask[i,:len(r)]=True
    return tok,mask
shapes=list(FLUENT.shapes);pr=list(FLUENT.shapes.values())
SEED=int(E.get('SEED','5'))
def batch(step):
    rng=np.random.default_rng((SEED,step));shape=shapes[rng.choice(len(shapes),p=pr)]
    if E.get('SQUARE'): shape=(256,256)
    sc=[training_scene(SEED,step*B+i,NN,collection=FLUENT,size=shape) for i in range(B)]
    x=np.stack([semantic_map(s,16) for s in sc])
    caps=['' if rng.random()<.1 else s.caption for s in sc]
    return torch.from_numpy(x).permute(0,3,1,2).contiguous(),*tokens_of(caps)
def pad(x): return F.pad(x,(0,0,0,0,K,0))
W=torch.ones(C);W[28:32]=2;W[:K]=.1;W=W.view(1,-1,1,1)
MODW={}
def muon_named(n,p): return p.ndim>=2 and p.numel()>4096 and 'embedding' not in n and 'head.linear' not in n and 'patch_embed' not in n and 'modulation' not in n and 'position' not in n
mu=[(n,p) for n,p in m.named_parameters() if muon_named(n,p)]
ad=[p for n,p in m.named_parameters() if not muon_named(n,p)]
print(sum(p.numel() for _,p in mu),sum(p.numel() for p in ad))
opt=torch.optim.AdamW(ad,lr=LR,betas=(.9,.99),weight_decay=0)
mom={n:torch.zeros_like(p) for n,p in mu}
groups={}
for n,p in mu: groups.setdefault((p.shape[0],p[0].numel()),[]).append((n,p))
@torch.no_grad()
def muon(lr):
    for (r,cc),ps in groups.items():
        us=[]
        for n,p in ps:
            v=mom[n];v.mul_(.95).add_(p.grad,alpha=.05);us.append((.05*p.grad+.95*v).reshape(r,cc))
        x=torch.stack(us);tall=r>cc
        if tall:x=x.mT
        x=x/(x.norm(dim=(1,2),keepdim=True)+1e-7)
        x=x.bfloat16() if not E.get('NSF32') else x
        for _ in range(5):
            s=x@x.mT;x=3.4445*x+(-4.775*s+2.0315*s@s)@x
        x=x.float()
        if tall:x=x.mT
        for (n,p),u in zip(ps,x): p.sub_(u.reshape(p.shape),alpha=lr*20*max(1,r/cc)**.5)
ema={k:v.clone() for k,v in m.state_dict().items()}
vs=[validation_scene(k,NN,collection=FLUENT,size=(256,256)) for k in range(96)]
vx=pad(torch.from_numpy(np.stack([semantic_map(s,16) for s in vs])).permute(0,3,1,2));vt=tokens_of([s.caption for s in vs])
gen=torch.Generator().manual_seed(1);veps=torch.randn(vx.shape,generator=gen)
G={'noun':slice(8,16),'col':slice(16,20),'row':slice(20,24),'side':slice(24,28),'color':slice(28,32),'ground':slice(32,36)}
@torch.no_grad()
def evaluate():
    raw={k:v.clone() for k,v in m.state_dict().items()};m.load_state_dict(ema);net.resize((16,16))
    inside=(vx[:,8:16].abs().amax(1)>0)
    for t in (.5,.8,.97,1.):
        v=torch.cat([m((1-t)*vx[i:i+32]+t*veps[i:i+32],torch.full((32,),t),vt[0][i:i+32],vt[1][i:i+32]) for i in range(0,96,32)])
        x0=((1-t)*vx+t*veps)-t*v
        out=[]
        for n,s in G.items():
            e,ref=x0[:,s]-vx[:,s],vx[:,s]
            if n!='ground': e,ref=e.permute(0,2,3,1)[inside],ref.permute(0,2,3,1)[inside]
            out.append(f'{n} {(e.square().mean()/ref.square().mean().clamp_min(1e-3)):.3f}')
        a,ac,ap=things_at28(x0[:,K:].permute(0,2,3,1).numpy());b,bc,bp=things_at28(vx[:,K:].permute(0,2,3,1).numpy());ii=b>0
        pl=np.all([p==q for p,q in zip(ap,bp)],0)
        out.append(f'right: noun {(a==b)[ii].mean():.3f} color {(ac==bc)[ii].mean():.3f} place {pl[ii].mean():.3f} all {((a==b)&(ac==bc)&pl)[ii].mean():.3f} empty {(a[~ii]>0).mean():.3f}')
        print(f'   t={t}',*out)
    sys.stdout.flush();m.load_state_dict(raw)
def save():
    save_file(ema,OUT+'_tmp');os.replace(OUT+'_tmp',OUT+'.safetensors')
    save_file(m.state_dict(),OUT+'_tmp');os.replace(OUT+'_tmp',OUT+'_raw.safetensors')
pool=ThreadPoolExecutor(1);nxt=pool.submit(batch,0)
EVERY=int(E.get('EVERY','200'));FALL=float(E.get('FALL','.4'));MIN=float(E.get('MIN','.05'))
t0=time.time();losses=[]
for step in range(STEPS):
    x,tok,mask=nxt.result();nxt=pool.submit(batch,step+1)
    x=pad(x);net.resize(tuple(x.shape[2:]))
    f=max(step/STEPS,(time.time()-t0)/SECONDS)
    lr=LR*min(1,(step+1)/50)*(1 if f<1-FALL else MIN+(1-MIN)*max(0,(1-f)/FALL))
    t=torch.sigmoid(torch.randn(B));t=4*t/(1+3*t);tt=t.view(-1,1,1,1);eps=torch.randn(x.shape)
    with torch.autocast('cpu',torch.bfloat16):
        v=m((1-tt)*x+tt*eps,t,tok,mask)
    loss=((v.float()-(eps-x)).square()*W).mean()
    opt.zero_grad();loss.backward()
    gn=torch.nn.utils.clip_grad_norm_(m.parameters(),1.)
    for g in opt.param_groups:g['lr']=lr
    opt.step();muon(lr)
    d=min(.997,(step+1)/(step+10))
    with torch.no_grad():
        sd=m.state_dict();ks=[k for k in sd if sd[k].is_floating_point()]
        torch._foreach_lerp_([ema[k] for k in ks],[sd[k] for k in ks],1-d)
    losses.append(loss.item())
    if step%20==19: print(step+1,f'{np.mean(losses[-20:]):.4f} gn {gn:.2f} lr {lr:.2e} {(time.time()-t0)/(step+1):.2f} s/step',flush=True)
    if (step+1)%EVERY==0 or step+1==STEPS: evaluate();save()
    if time.time()-t0>SECONDS: evaluate();save();break
