"""python conv6.py OUT [TRANSFORMER] [HEAD] [K]: a model folder of our parts."""
import sys,json,math,numpy as np,torch
sys.path.insert(0,'.')
from pathlib import Path
from dataclasses import replace
import mlx.core as mx
from mlx.utils import tree_unflatten
from mlx_snapgen.checkpoint.model import load_autoencoder,load_pretrained
from mlx_snapgen.networks.layers import flat_parameters
from train.loop.autoencoder import with_other_latents
from mlx_snapgen.semantics import SemanticConfig
from mlx_snapgen.config import AutoencoderConfig
from safetensors.torch import load_file
def autoencoder(table='work/table.pt',paint='work/paint.safetensors',head=None,dec=None,K=8):
    base=load_autoencoder(Path('start'))
    mean,std=np.array(base.config.latents_mean),np.array(base.config.latents_std)
    m=with_other_latents(base,latent_channels=K,semantics=SemanticConfig(150,(2,4,6,8,10,12,14,16)))
    t=torch.load(table);w={}
    w['decoder.table.things.weight']=t['table'].numpy()*std+mean;w['decoder.table.empty']=t['flat'].numpy()*std+mean
    p=load_file(paint);A=lambda k:p[k].numpy()
    for a,b in (('pixel','pix'),('layers.0','mid'),('layers.1','mid2'),('out','out')): w[f'decoder.paint.{a}.weight']=A(b+'.weight');w[f'decoder.paint.{a}.bias']=A(b+'.bias')
    w['decoder.paint.thing.weight']=A('thing.weight')
    for a,b in (('color','color'),('color_again','cmid')):
        x=np.zeros((24,48),np.float32);x[:11]=A(b+'.weight');w[f'decoder.paint.{a}.weight']=x
    from train.data.stickers.vocabulary import FLUENT
    g=-np.ones((24,4),np.float32)
    for i,c in enumerate(FLUENT.backgrounds.values()):
        if c is not None: g[i]=np.array([*c,255])/127.5-1
    w['decoder.paint.grounds']=g
    if head:
        h=load_file(head);out=base.encoder.out;n=32
        W=np.array(out.weight[:n].astype(mx.float32))/std[:,None];b=(np.array(out.bias[:n])-mean)/std
        I=h['inp.weight'][:,:,0,0].numpy()
        w['encoder.semantics.inp.weight']=I@W;w['encoder.semantics.inp.bias']=I@b+h['inp.bias'].numpy()
        for i in range(4):
            w[f'encoder.semantics.blocks.{i}.norm.weight']=h[f'blocks.{i}.w'].numpy()
            for c in('conv1','conv2'):
                w[f'encoder.semantics.blocks.{i}.{c}.weight']=h[f'blocks.{i}.{c}.weight'].permute(0,2,3,1).numpy();w[f'encoder.semantics.blocks.{i}.{c}.bias']=h[f'blocks.{i}.{c}.bias'].numpy()
        pr=np.r_[0:8,11:19,8:11];w['encoder.semantics.out.weight']=h['out.weight'][:,:,0,0].numpy()[pr];w['encoder.semantics.out.bias']=h['out.bias'].numpy()[pr]
    if dec:
        d=load_file(dec);r=lambda n:d[n]
        for k,v in d.items():
            if k.startswith('b') and k[1].isdigit():
                i,j,rest=k[1:].split('.',2);rest={'w':'norm.weight'}.get(rest,rest);name=f'decoder.blocks{i}.{j}.{rest}'
            elif k in('mean','std'): continue
            else: name='decoder.'+k
            v=v.float()
            if v.ndim==4: v=v[:,:,0,0] if name.startswith('decoder.up') else v.permute(0,2,3,1)
            w[name]=v.contiguous().numpy()
    own=flat_parameters(m)
    for k,v in w.items(): assert own[k].shape==tuple(v.shape),(k,own[k].shape,v.shape)
    m.update(tree_unflatten([(k,mx.array(v.astype(np.float32))) for k,v in w.items()]))
    return m
