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
NL=int(E.get('NL','4'));enc=TextEncoder(from_dict(TextEncoderConfig,dict(cfgs['text_encoders'][0],num_layers=NL)))
class M(torch.nn.Module):
    def __init__(s):
        super().__init__();s.net,s.enc=net,enc
    def forward(s,x,t,tok,mask):
        st=s.enc(tok,mask);text,m=s.net.encode_text([(st,mask)])
        return s.net(x,t,text,m)
I=torch.load('work/idx.pt',weights_only=False);maps=I['maps'];off=I['offsets'];shp=I['shapes'];N_=I['n']
nets={1.0:net}
for sh in (.5,.375): nets[sh]=EfficientDiT(from_dict(TransformerConfig,dict(cfgs['transformer'],widths=[1.0,.5,.375])).standalone(sh),(16,16))
P=torch.nn.Parameter(torch.zeros(N_))
init=E['INIT'];w=load_file(init)
for k,v in enc.state_dict().items():
    if 'enc.'+k not in w:
        print('new',k);w['enc.'+k]=torch.zeros_like(v) if 'out_proj' in k or 'linear2' in k else v.clone()
with torch.no_grad():
    if 'P' in w: P.copy_(w.pop('P'));enc.load_state_dict({k[4:]:v for k,v in w.items()})
    else:
        for k,i in maps[1.0].items(): P[i.reshape(-1)]=w['net.'+k].reshape(-1)
        for k,i in I['start'].items(): n=i.size;P[off[k]:off[k]+n]=P[torch.from_numpy(i.reshape(-1))]
        enc.load_state_dict({k[4:]:v for k,v in w.items() if k.startswith('enc.')})
ALL={sh:torch.cat([i.reshape(-1) for i in maps[sh].values()]) for sh in maps}
leaf={};XP=float(E.get('XP','0'));GA=[1. if E.get('XPA','0')=='0' else 0.]
def run(share,P,x,t,tok,mask,st=None):
    st=enc(tok,mask) if st is None else st
    nt=nets[share];fl=P.detach()[ALL[share]].requires_grad_(torch.is_grad_enabled());leaf[share]=fl
    pm={k:v.reshape(i.shape) for (k,i),v in zip(maps[share].items(),fl.split([i.numel() for i in maps[share].values()]))}
    o=torch.func.functional_call(W_[share],{'n.'+k:v for k,v in pm.items()},(x,t,st,mask)).float()
    if not XP: return o
    g=GA[0];r=1/t.clamp(min=.05).view(-1,1,1,1);return g*r*x+(1-g+g*r)*o
class Wrap(torch.nn.Module):
    def __init__(s,n): super().__init__();s.n=n
    def forward(s,x,t,st,mask):
        text,mm=s.n.encode_text([(st,mask)]);return s.n(x,t,text,mm)
W_={k:Wrap(v) for k,v in nets.items()}
sp=load_processor(open('start/tokenizer_0.model','rb').read())
L=32
def tokens_of(prompts):
    rows=[[sp.bos_id(),*sp.encode(normalize(p))[:L-2],sp.eos_id()] for p in prompts]
    n=max(map(len,rows))
    tok=torch.full((len(rows),n),sp.pad_id());mask=torch.zeros(len(rows),n,dtype=torch.bool)
    for i,r in enumerate(rows): tok[i,:len(r)]=torch.tensor(r);mask[i,:len(r)]=True
    return tok,mask
from dataclasses import replace as _r
FL2=_r(FLUENT,categories=json.loads(E['CATS']) if 'CATS' in E else dict(single_object=.04,two_objects=.1,counting=.13,colors=.05,position=.36,color_attribution=.15,size=.12,background=.02,mixed=.03))
shapes=list(FLUENT.shapes);pr=list(FLUENT.shapes.values())
SEED=int(E.get('SEED','5'))
def batch(step):
    rng=np.random.default_rng((SEED,step));shape=shapes[rng.choice(len(shapes),p=pr)]
    nu=NU if shape==(256,256) else 0
    def one(i):
        s=training_scene(SEED,step*B+i,NN,collection=FL2,size=shape)
        return training_scene(SEED+1,step*B+i,NN,collection=FL2,size=shape) if s.relation in ('left','right') and rng.random()<float(E.get('VERT','.5')) else s
    sc=[one(i) for i in range(B-nu)]
    x=pad(torch.from_numpy(np.stack([semantic_map(s,16) for s in sc])).permute(0,3,1,2));caps=[s.caption for s in sc]
    if nu:
        j=rng.integers(NCAP,size=nu);x=torch.cat([x,CAPX[j]]);caps+=[CAPC[i] for i in j]
    caps=['' if rng.random()<.1 else c for c in caps]
    return x.contiguous(),*tokens_of(caps),nu
def pad(x): return F.pad(x,(0,0,0,0,K,0))
CAP=np.load('cap.npz');FLAT=torch.load('fd_table.pt')['flat'].numpy();NCAP=len(CAP['lat'])
cl=(CAP['lat'].astype(np.float32)-FLAT)[...,:K]*CAP['unk'][...,None];cg=CAP['sem'][...,15:19].astype(np.float32)*(~CAP['unk'])[...,None]
CAPX=torch.from_numpy(np.concatenate([cl,np.zeros((*cl.shape[:3],24),np.float32),cg],-1)).permute(0,3,1,2).contiguous();CAPC=[str(c) for c in CAP['caps']];del cl,cg
print('cap appearance rms',CAPX[:,:K].square().sum().item(),float(CAPX[:,:K].square().sum()/(CAP['unk'].sum()*K)))
NU=int(E.get('NU','4'));TP=float(E.get('TP','.5'))
KDW=float(E.get('KDW','.7'));SUBW=float(E.get('SUBW','.7'));W=torch.ones(C);W[28:32]=2;W[:K]=.1;W=W.view(1,-1,1,1)
MODW={}
def muon_named(n,shape): return len(shape)>=2 and math.prod(shape)>4096 and 'members' not in n and 'embedding' not in n and 'head.linear' not in n and 'patch_embed' not in n and 'modulation' not in n and 'position' not in n
mu=[(k,off[k],tuple(v)) for k,v in shp.items() if muon_named(k,v)]
ismu=torch.zeros(N_,dtype=torch.bool)
for k,o,sh in mu: ismu[o:o+math.prod(sh)]=True
adi=torch.nonzero(~ismu)[:,0];A=torch.nn.Parameter(P.detach()[adi].clone())
emu=[(n,p) for n,p in enc.named_parameters() if muon_named('text.'+n,p.shape)];ad=[p for n,p in enc.named_parameters() if not muon_named('text.'+n,p.shape)]
print(ismu.sum(),len(adi))
opt=torch.optim.AdamW([A]+ad,lr=LR,betas=(.9,.99),weight_decay=0)
mom=torch.zeros(N_);emom={n:torch.zeros_like(p) for n,p in emu}
groups={}
for k,o,sh in mu: groups.setdefault((sh[0],math.prod(sh[1:])),[]).append(o)
for n,p in emu: groups.setdefault((p.shape[0],p[0].numel()),[]).append((n,p))
@torch.no_grad()
def muon(lr):
    g=P.grad;mom.mul_(.95).add_(g,alpha=.05);U=.05*g+.95*mom
    for (r,cc),ps in groups.items():
        us=[]
        for q in ps:
            if isinstance(q,int): us.append(U[q:q+r*cc].reshape(r,cc))
            else:
                v=emom[q[0]];v.mul_(.95).add_(q[1].grad,alpha=.05);us.append((.05*q[1].grad+.95*v).reshape(r,cc))
        x=torch.stack(us);tall=r>cc
        if tall:x=x.mT
        x=(x/(x.norm(dim=(1,2),keepdim=True)+1e-7)).bfloat16()
        for _ in range(int(E.get('NS','3'))):
            s=x@x.mT;x=3.4445*x+(-4.775*s+2.0315*s@s)@x
        x=x.float()
        if tall:x=x.mT
        for q,u in zip(ps,x):
            f=lr*20*max(1,r/cc)**.5
            if isinstance(q,int): P[q:q+r*cc]-=f*u.reshape(-1)
            else: q[1].sub_(u.reshape(q[1].shape),alpha=f)
def state(): return {'P':P.detach(),**{'enc.'+k:v for k,v in enc.state_dict().items()}}
ema={k:v.clone() for k,v in state().items()}
vs=[validation_scene(k,NN,collection=FLUENT,size=(256,256)) for k in range(96)]
vx=pad(torch.from_numpy(np.stack([semantic_map(s,16) for s in vs])).permute(0,3,1,2));vt=tokens_of([s.caption for s in vs])
gen=torch.Generator().manual_seed(1);veps=torch.randn(vx.shape,generator=gen)
G={'noun':slice(8,16),'col':slice(16,20),'row':slice(20,24),'side':slice(24,28),'color':slice(28,32),'ground':slice(32,36)}
@torch.no_grad()
def put(w): P.copy_(w['P']);enc.load_state_dict({k[4:]:v for k,v in w.items() if k!='P'})
@torch.no_grad()
def evaluate():
    raw={k:v.clone() for k,v in state().items()};put(ema)
    for q in nets.values(): q.resize((16,16))
    inside=(vx[:,8:16].abs().amax(1)>0)
    for share,t in ((1.,.5),(1.,.8),(1.,.97),(1.,1.),(.5,.8),(.5,1.),(.375,.8),(.375,1.)):
        v=torch.cat([run(share,P,(1-t)*vx[i:i+32]+t*veps[i:i+32],torch.full((32,),t),vt[0][i:i+32],vt[1][i:i+32]) for i in range(0,96,32)])
        x0=((1-t)*vx+t*veps)-t*v
        out=[]
        for n,s in G.items():
            e,ref=x0[:,s]-vx[:,s],vx[:,s]
            if n!='ground': e,ref=e.permute(0,2,3,1)[inside],ref.permute(0,2,3,1)[inside]
            out.append(f'{n} {(e.square().mean()/ref.square().mean().clamp_min(1e-3)):.3f}')
        a,ac,ap=things_at28(x0[:,K:].permute(0,2,3,1).numpy());b,bc,bp=things_at28(vx[:,K:].permute(0,2,3,1).numpy());ii=b>0
        pl=np.all([p==q for p,q in zip(ap,bp)],0)
        out.append(f'right: noun {(a==b)[ii].mean():.3f} color {(ac==bc)[ii].mean():.3f} place {pl[ii].mean():.3f} all {((a==b)&(ac==bc)&pl)[ii].mean():.3f} empty {(a[~ii]>0).mean():.3f}')
        print(f'   w={share} t={t}',*out)
    sys.stdout.flush();put(raw)
def save():
    save_file(ema,OUT+'_tmp');os.replace(OUT+'_tmp',OUT+'.safetensors')
    save_file(state(),OUT+'_tmp');os.replace(OUT+'_tmp',OUT+'_raw.safetensors')
pool=ThreadPoolExecutor(1);nxt=pool.submit(batch,0)
EVERY=int(E.get('EVERY','200'));FALL=float(E.get('FALL','.4'));MIN=float(E.get('MIN','.05'))
t0=time.time();losses=[];subs=[];uls=[]
for step in range(STEPS):
    x,tok,mask,nu=nxt.result();nxt=pool.submit(batch,step+1)
    for q in nets.values(): q.resize(tuple(x.shape[2:]))
    f=max(step/STEPS,(time.time()-t0)/SECONDS)
    lr=LR*min(1,(step+1)/50)*(1 if f<1-FALL else MIN+(1-MIN)*max(0,(1-f)/FALL))
    t=torch.sigmoid(torch.randn(B));t=4*t/(1+3*t);t=torch.where(torch.rand(B)<TP,1-.12*torch.rand(B).square(),t);tt=t.view(-1,1,1,1);eps=torch.randn(x.shape)
    WS=W.expand(B,-1,1,1)
    if XP: WS=WS*(tt/float(E.get('TW','.3'))).clamp(max=1.).square()
    if nu: WS=WS.clone();WS[-nu:,:K]=float(E.get('UW','10'))*WS[-nu:,:K] if XP else 1.
    if float(E.get('XPA','0')): GA[0]=min(1.,(step+1)/float(E['XPA']))
    P.grad=None;opt.zero_grad()
    for p_ in enc.parameters(): p_.grad=None
    with torch.autocast('cpu',torch.bfloat16):
        st=enc(tok,mask);xt=(1-tt)*x+tt*eps
        v=run(1.,P,xt,t,tok,mask,st).float()
        sq=(v-(eps-x)).square();loss=(sq*WS).mean();ul=(sq*WS)[-nu:,:K].mean().item() if nu else None
        aim=KDW*v.detach()+(1-KDW)*(eps-x)
        ls=[((run(sh,P,xt,t,tok,mask,st).float()-aim).square()*WS).mean() for sh in (.5,.375)]
    (loss+SUBW*(ls[0]+ls[1])).backward()
    P.grad=torch.zeros(N_)
    for sh in (1.,.5,.375): P.grad[ALL[sh]]+=leaf[sh].grad
    gn=torch.nn.utils.clip_grad_norm_([P,*enc.parameters()],1.5)
    A.grad=P.grad[adi]
    for g in opt.param_groups:g['lr']=lr
    opt.step();muon(lr)
    with torch.no_grad():
        P[adi]=A
        d=min(.997,(step+1)/(step+10));sd=state();ks=list(ema)
        torch._foreach_lerp_([ema[k] for k in ks],[sd[k] for k in ks],1-d)
    subs.append([q.item() for q in ls])
    losses.append(loss.item());uls+=[ul] if nu else []
    if step%20==19: print(step+1,f'{np.mean(losses[-20:]):.4f} sub {np.mean(subs[-20:],0).round(4)} unk {np.mean(uls[-20:]):.3f} gn {gn:.2f} lr {lr:.2e} {(time.time()-t0)/(step+1):.2f} s/step',flush=True)
    if (step+1)%EVERY==0 or step+1==STEPS: evaluate();save()
    if time.time()-t0>SECONDS: evaluate();save();break
