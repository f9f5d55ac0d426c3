"""python pool2.py N SEED OUT KIND: st (strangers: other emoji among known things), stv (held-out strangers), cap (nouns 150..199 with captions)"""
import sys,time,os,zlib,numpy as np
sys.path.insert(0,'work');sys.path.insert(0,'.')
N,SEED,OUT,KIND=int(sys.argv[1]),int(sys.argv[2]),sys.argv[3],sys.argv[4]
from dataclasses import replace
from pathlib import Path
from train.data.stickers.vocabulary import collection_in
from train.data.stickers.scenes import training_scene
from train.data.stickers.semantics import *
from train.data.stickers.render import render
import torch;torch.set_num_threads(1);import ae as AE;enc=AE.Encoder(*AE.load('start')).requires_grad_(False)
coll=collection_in(Path('fluent/package/assets'));known={n.emoji.replace('\ufe0f','') for n in coll.nouns}
files=[]
for f in sorted(os.listdir('fluent/package/assets')):
    p=f[:-5].split('-')
    if not f.endswith('.webp') or any(x in('1f3fb','1f3fc','1f3fd','1f3fe','1f3ff') for x in p): continue
    if any(len(x)>5 or int(x,16)>0x10ffff for x in p if all(c in '0123456789abcdef' for c in x)) or not all(c in '0123456789abcdef' for x in p for c in x): continue
    e=''.join(chr(int(x,16)) for x in p)
    if e.replace('\ufe0f','') in known: continue
    if (zlib.crc32(f.encode())%10==0)==(KIND=='stv'): files.append(e)
print(len(files),'strangers')
rng=np.random.default_rng((55,SEED));base=coll.nouns[0]
late=replace(coll,nouns=coll.nouns[150:200])
lat,sem,caps,un,buf=[],[],[],[],[];t0=time.time()
def flush():
    global buf
    z=enc(AE.pics(np.stack(buf)));lat.append(z.permute(0,2,3,1).numpy().astype(np.float16));buf=[]
k=0;done=0
while done<N:
    k+=1
    if KIND=='cap':
        s=training_scene(31000+SEED,k,50,collection=late,size=(256,256));s=replace(s,collection=coll);unk=[True]*len(s.placed);caps.append(s.caption)
    else:
        s=training_scene(32000+SEED,k,150,collection=coll,size=(256,256));r=rng.random();share=1. if r<.4 else .5
        swap={}
        pl=[];unk=[]
        for p in s.placed:
            key=p.noun.name
            if key not in swap: swap[key]=replace(base,emoji=files[rng.integers(len(files))],recolor=p.noun.recolor) if False else (files[rng.integers(len(files))] if rng.random()<share else None)
            e=swap[key];unk.append(e is not None)
            if e is not None: pl.append(replace(p,noun=replace(coll.nouns[0],emoji=e),color=None))
            else: pl.append(p)
        s=replace(s,placed=tuple(pl))
    try: px=render(s)
    except Exception as ex: print(ex);continue
    fix=replace(s,placed=tuple(replace(p,noun=coll.nouns[0]) if u else p for p,u in zip(s.placed,unk)))
    sm=semantic_map(fix,16)[...,np.r_[0:8,16:19,8:16]]
    u=np.zeros((16,16),bool)
    for p,b in zip(s.placed,unk):
        if b: u[p.y//16:(p.y+p.size_px)//16,p.x//16:(p.x+p.size_px)//16]=True
    sm[u]=0;sem.append(sm.astype(np.float16));un.append(u);buf.append(px);done+=1
    if len(buf)==16 or done==N: flush()
    if done%320==0: print(done,round(time.time()-t0,1),flush=True)
np.savez(OUT,lat=np.concatenate(lat),sem=np.stack(sem),unk=np.stack(un),caps=np.array(caps))
