import sys;sys.path[:0]=['.','work']
import mlx_snapgen,numpy as np,mlx.core as mx
from conv6 import autoencoder
from pathlib import Path
from train.data.stickers.vocabulary import collection_in
from train.data.stickers.scenes import validation_scene
from train.data.stickers.semantics import semantic_map
from train.data.stickers.render import render
from mlx_snapgen.pictures import from_uint8
from mlx_snapgen.networks.autoencoders.semantics import as_codes
import time;t0=time.time()
m=autoencoder(table='fd_table.pt',paint='fd_paint.safetensors',head=sys.argv[1],dec='fd_dec.safetensors')
coll=collection_in(Path('fluent/package/assets'));N=int(sys.argv[2]);E=[];D=[]
for a in range(0,N,8):
    sc=[validation_scene(k,150,collection=coll) for k in range(a,min(a+8,N))]
    px=np.stack([render(s) for s in sc]);x=np.array(from_uint8(px))
    sem=np.stack([semantic_map(s,16) for s in sc]) if len({s.size for s in sc})==1 else None
    d=np.array(mx.clip(m.decode(m.encode(mx.array(x))),-1,1));e=((x-d)/2)**2;E+=e.mean((1,2,3)).tolist()
    z=mx.concatenate([mx.zeros((len(sc),*sem.shape[1:3],8)),as_codes(mx.array(sem),m.config.semantics)],-1)
    d=np.array(mx.clip(m.decode(z),-1,1));D+=(((x-d)/2)**2).mean((1,2,3)).tolist()
E=np.array(E);print(len(E),'encoded',-10*np.log10(E.mean()),'codes',-10*np.log10(np.mean(D)),'median',-10*np.log10(np.median(E)),'per scene sorted',np.sort(-10*np.log10(E)).round(1)[:12],np.argsort(-E)[:8])
