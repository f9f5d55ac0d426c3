import sys,numpy as np,torch
sys.path.insert(0,'work');sys.path.insert(0,'work/int');torch.set_num_threads(1)
from render6 import *
from pathlib import Path
from train.data.stickers.vocabulary import collection_in
from train.data.stickers.scenes import training_scene,validation_scene
from train.data.stickers.semantics import semantic_map
from train.data.stickers.render import render
from PIL import Image
coll=collection_in(Path('fluent/package/assets'))
r=R(*sys.argv[2:]).eval()
sc=[validation_scene(k,150,collection=coll) for k in range(48)]
px=np.stack([render(s) for s in sc]);x=AE.pics(px);sem=torch.from_numpy(np.stack([semantic_map(s,16) for s in sc])).permute(0,3,1,2)
w,c=AE.load('start');enc=AE.Encoder(w,c)
with torch.no_grad():
    y=r(sem).clamp(-1,1);a=AE.Decoder(w,c)(enc(x)).clamp(-1,1)
    m=lambda p:((p-x)/2).square().mean((1,2,3));f=lambda p:-10*np.log10(m(p).mean().item())
    print('table',f(y),'autoencoder 32',f(a))
    kinds={}
    for s,v,u in zip(sc,m(y).tolist(),m(a).tolist()): kinds.setdefault(s.category,[]).append((v,u))
    for k,v in kinds.items(): print(k,len(v),*(round(-10*np.log10(np.mean(q)),1) for q in zip(*v)))
def img(t):
    t=((t+1)/2).clamp(0,1).permute(1,2,0).numpy();return (t[...,:3]+(1-t[...,3:])*np.array([.93,.93,.97]))
rows=[]
for k in range(0,16,4): 
    for src in (x,y): rows.append(np.concatenate([img(src[k+j]) for j in range(4)],1))
Image.fromarray((np.concatenate(rows)*255).clip(0,255).astype(np.uint8)).save(sys.argv[1])
