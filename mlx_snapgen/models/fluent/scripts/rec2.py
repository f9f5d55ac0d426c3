import sys;sys.path[:0]=['.','work']
import mlx_snapgen,numpy as np,mlx.core as mx
from conv6 import autoencoder
from pathlib import Path
from PIL import Image
from train.data.stickers.source import Stickers,draw_scenes
from mlx_snapgen.pictures import from_uint8
from mlx_snapgen.networks.autoencoders.semantics import is_known
m=autoencoder(table='fd_table.pt',paint='fd_paint.safetensors',head=sys.argv[1],dec='fd_dec.safetensors')
s=Stickers(seed=5,num_nouns=150,pictures=Path('fluent/package/assets'),strangers=True);R=[];U=[];rows=[]
for n in range(int(sys.argv[2])):
    sc=s.scenes(n,8)
    if sc[0].size!=(256,256): continue
    px,_=draw_scenes(sc);x=from_uint8(px);z=m.latents(x);y=np.array(mx.clip(m.decode(m.normalize(z)),-1,1));x=np.array(x)
    e=(((x-y)/2)**2).mean((1,2,3));st=[any(p.noun.plural==p.noun.name and '-' in p.noun.name or p.noun.name[0].isdigit() for p in c.placed) for c in sc]
    R+=[v for v,b in zip(e,st) if not b];U+=[v for v,b in zip(e,st) if b]
    if len(rows)<4: rows+=[np.concatenate(list(x[:6]),1),np.concatenate(list(y[:6]),1)]
print('known',len(R),-10*np.log10(np.mean(R)),'with strangers',len(U),-10*np.log10(np.mean(U)))
o=(np.concatenate(rows)+1)/2;o=o[...,:3]+(1-o[...,3:])*.93;Image.fromarray((o*255).clip(0,255).astype(np.uint8)).save(sys.argv[3])
