import sys,json,numpy as np,torch
sys.path[:0]=['.','work']
import mlx.core as mx
from mlx.utils import tree_flatten,tree_unflatten
from dataclasses import replace
from pathlib import Path
from mlx_snapgen.config import TransformerConfig
from mlx_snapgen.json_values import from_dict
from mlx_snapgen.networks.efficient_dit import EfficientDiT
c=json.load(open('start/config.json'))['transformer'];c.update(patch_size=2,latent_channels=36)
cfg=from_dict(TransformerConfig,c);net=EfficientDiT(cfg)
flat=dict(tree_flatten(net.parameters()));n=0
members=[k for k in flat if '.members.' in k];print(len(flat),sum(v.size for v in flat.values()),len(members));print([ (k,flat[k].shape) for k in members][:12])
off={};vals={}
for k,v in flat.items():
    off[k]=n;vals[k]=mx.array(np.arange(n,n+v.size,dtype=np.float32).reshape(v.shape));n+=v.size
net.update(tree_unflatten(list(vals.items())))
from mlx_snapgen.networks.elastic import extract
from convert.pytorch.efficient_dit import EfficientDiT as T
from convert.pytorch.weights import torch_weights,_shapes
out={}
for share in (1.0,.5,.375):
    sub=extract(net,share);tw=T(cfg.standalone(share),(16,16))
    out[share]={k:torch.from_numpy(f().astype(np.int64)) for k,f in torch_weights(sub,_shapes(tw)).items()}
    print(share,sum(v.numel() for v in out[share].values()))
# how members of narrow widths start: a slice of the full width's
start={}
for k in members:
    a,i,b=k.partition('.members.')[0],int(k.split('.members.')[1].split('.')[0]),k.split('.members.')[1].split('.',1)[1]
    if i==0: continue
    F=np.array(vals[f'{a}.members.0.{b}']).astype(np.int64);s=flat[k].shape;d={1:128,2:96}[i]
    for ax in range(F.ndim):
        if F.shape[ax]!=s[ax]:
            g=F.shape[ax]//256;assert F.shape[ax]==g*256 and s[ax]==g*d,(k,F.shape,s)
            F=np.moveaxis(np.moveaxis(F,ax,0).reshape(g,256,*np.moveaxis(F,ax,0).shape[1:])[:,:d].reshape(g*d,*np.moveaxis(F,ax,0).shape[1:]),0,ax)
    assert F.shape==s;start[k]=F
torch.save(dict(maps=out,offsets=off,shapes={k:v.shape for k,v in flat.items()},start=start,n=n),'idx.pt');print(n)
