"""Decoder, table and paint on pixels. args: OUT SECONDS LR"""
import sys,time,os,numpy as np,torch,torch.nn as nn,torch.nn.functional as F
sys.path.insert(0,'work');sys.path.insert(0,'work/int');torch.set_num_threads(1)
OUT,SECONDS,LR=sys.argv[1],float(sys.argv[2]),float(sys.argv[3]);sys.argv=['pool.py','0','0','x']
import ae as AE,paint as PA
from dataclasses import replace
from pathlib import Path
from concurrent.futures import ThreadPoolExecutor
from safetensors.torch import load_file,save_file
from train.data.stickers.captions import Placed,Scene
from train.data.stickers.vocabulary import collection_in
from train.data.stickers.scenes import training_scene,validation_scene,is_held_out_color
from train.data.stickers.render import render
coll=collection_in(Path('fluent/package/assets'));nouns=coll.nouns;colors=list(coll.colors);bgs=list(coll.backgrounds);sides=list(coll.sides)
START=np.concatenate([[0],np.cumsum([(s//16)**2 for s in sides])]);PAGE=START[-1];NN=150;K=8
grounds=[g for g in bgs if g!='transparent'];SZ=np.array(sides[::-1])
w,cfg=AE.load('start');enc=AE.Encoder(w,cfg);dec=AE.Decoder(w,cfg).to(memory_format=torch.channels_last);paint=PA.Paint();paint.load_state_dict(load_file('paint.safetensors'))
t=torch.load('table.pt');table=nn.Embedding.from_pretrained(t['table'],freeze=False,sparse=True);flat=nn.Parameter(t['flat'].clone())
G=torch.zeros(len(bgs),4)-1
for k,c in enumerate(coll.backgrounds.values()):
    if c is not None: G[k]=torch.tensor([*c,255])/127.5-1
def maps(s):
    h,w_=s.size[0]//16,s.size[1]//16;row=np.full((h,w_),-1);thing=np.zeros((h,w_),int);color=np.full((h,w_),-1);unk=np.zeros((h,w_),bool)
    for p in s.placed:
        y,x,m=p.y//16,p.x//16,p.size_px//16;n=nouns.index(p.noun);sl=(slice(y,y+m),slice(x,x+m))
        if n>=NN: unk[sl]=True;continue
        row[sl]=n*PAGE+START[sides.index(p.size_px)]+np.arange(m*m).reshape(m,m);thing[sl]=n;color[sl]=-1 if p.color is None else colors.index(p.color)
    return row,thing,color,unk,bgs.index(s.background)
def packed(rng):
    occ=np.zeros((16,16),bool);placed=[];g='transparent' if rng.random()<.7 else grounds[rng.integers(len(grounds))];first=True
    for _ in range(30):
        p=np.array([.2,.22,.16,.18,.1,.08,.04,.02]) if first else np.array([0,0,.05,.1,.2,.3,.25,.1])
        s=int(rng.choice(SZ,p=p/p.sum()));m=s//16;y,x=rng.integers(0,16-m+1,2)
        if occ[y:y+m,x:x+m].any(): continue
        first=False;n=nouns[150+rng.integers(50)] if rng.random()<.12 else nouns[rng.integers(150)];c=None
        if n.recolor and rng.random()<.35:
            c=colors[rng.integers(len(colors))]
            if is_held_out_color(n,c): c=None
        if g!='transparent' and g in (n.lost_on if c is None else coll.color_lost_on[c]): continue
        occ[y:y+m,x:x+m]=True;placed.append(Placed(n,c,s,int(x*16),int(y*16),None))
    return Scene('mixed',tuple(placed),g,'',None,True,coll,(256,256))
B=6
def batch(k):
    rng=np.random.default_rng((5,k));sc=[packed(rng) if rng.random()<.6 else training_scene(77,k*B+i,150,collection=coll,size=(256,256)) for i in range(B)]
    return np.stack([render(s) for s in sc]),[maps(s) for s in sc]
up=lambda m:m.repeat_interleave(16,-2).repeat_interleave(16,-1)
def forward(x,mp,unknown):
    row=torch.from_numpy(np.stack([m[0] for m in mp]));thing=torch.from_numpy(np.stack([m[1] for m in mp]));color=torch.from_numpy(np.stack([m[2] for m in mp]));unk=torch.from_numpy(np.stack([m[3] for m in mp]));g=torch.tensor([m[4] for m in mp])
    unk=unk|unknown[:,None,None];row=torch.where(unk,-1,row)
    z=torch.where((row>=0)[...,None],table(row.clamp(min=0)),flat).permute(0,3,1,2)
    if unk.any():
        with torch.no_grad(): a=enc(x)
        a=a-flat.detach().view(1,-1,1,1);a[:,K:]=0;a=a+.1*torch.randn(a.shape)*a[:,:1].ne(0);a[:,K:]=0
        z=z+a*unk[:,None]
    y=dec(z).float();pm=(row>=0)&(color>=0)
    if pm.any():
        m=up(pm);yp=y.permute(0,2,3,1).clone();yp[m]=paint(yp[m],up(thing)[m],up(color)[m]);y=yp.permute(0,3,1,2)
    ground=G[g][:,:,None,None].expand(-1,-1,256,256);al=((y[:,3:]+1)/2).clamp(0,1);on=up(~unk)[:,None].float()
    return y+on*(1-al)*(ground+1)
vs=[validation_scene(k,150,collection=coll) for k in range(48)];vx=AE.pics(np.stack([render(s) for s in vs]));vm=[maps(s) for s in vs]
rng=np.random.default_rng(3);us=[packed(rng) for _ in range(24)];ux=AE.pics(np.stack([render(s) for s in us]));um=[maps(s) for s in us]
params=[*dec.parameters(),flat,*paint.parameters()]
opt=torch.optim.Adam(params,lr=LR,betas=(.9,.98));opt2=torch.optim.SparseAdam([table.weight],lr=LR)
def state(): return {**{'dec.'+k:v for k,v in dec.state_dict().items()},**{'paint.'+k:v for k,v in paint.state_dict().items()},'table':table.weight.detach(),'flat':flat.detach()}
ema={k:v.clone() for k,v in state().items()}
def put(s):
    dec.load_state_dict({k[4:]:v for k,v in s.items() if k.startswith('dec.')});paint.load_state_dict({k[6:]:v for k,v in s.items() if k.startswith('paint.')});table.weight.data.copy_(s['table']);flat.data.copy_(s['flat'])
@torch.no_grad()
def evaluate():
    raw={k:v.clone() for k,v in state().items()};put(ema)
    f=lambda x,m,u:np.concatenate([((forward(x[i:i+8],m[i:i+8],torch.full((8,),u)).clamp(-1,1)-x[i:i+8])/2).square().mean((1,2,3)).numpy() for i in range(0,len(x),8)])
    r=[f(vx,vm,False),f(ux,um,False),f(ux,um,True)];put(raw)
    return 'scenes %.2f packed %.2f unknown %.2f dB'%tuple(-10*np.log10(q.mean()) for q in r)
def save():
    s={k:v.contiguous() for k,v in ema.items()};save_file({k:v for k,v in s.items() if not k.startswith('paint.') and k!='table' and k!='flat'} and {k[4:]:v for k,v in s.items() if k.startswith('dec.')},OUT+'_dec.safetensors');save_file({k[6:]:v for k,v in s.items() if k.startswith('paint.')},OUT+'_paint.safetensors');torch.save(dict(table=s['table'],flat=s['flat']),OUT+'_table.pt')
print('start',evaluate(),flush=True)
pool=ThreadPoolExecutor(1);nx=pool.submit(batch,0);t0=time.time();step=0;ls=[]
while time.time()-t0<SECONDS:
    px,mp=nx.result();nx=pool.submit(batch,step+1);x=AE.pics(px);f=(time.time()-t0)/SECONDS;lr=LR*min(1,(step+1)/50)*(1 if f<.3 else max(.02,(1-f)/.7))
    with torch.autocast('cpu',torch.bfloat16): y=forward(x,mp,torch.rand(B)<.2)
    e=y.float()-x;loss=e.abs().mean()+.5*((e[:,:,1:]-e[:,:,:-1]).abs().mean()+(e[:,:,:,1:]-e[:,:,:,:-1]).abs().mean())+2*e.square().mean()
    opt.zero_grad();opt2.zero_grad();loss.backward()
    for g in opt.param_groups:g['lr']=lr
    for g in opt2.param_groups:g['lr']=lr*4
    opt.step();opt2.step();ls.append(loss.item());step+=1
    if step%2==0:
        d=min(.99,step/(step+9))**2
        with torch.no_grad(): ks=list(ema);sd=state();torch._foreach_lerp_([ema[k] for k in ks],[sd[k] for k in ks],1-d)
    if step%100==0: print(step,f'{time.time()-t0:.0f}s loss {np.mean(ls[-100:]):.4f}',evaluate(),flush=True);save()
print('end',step,evaluate());save()
