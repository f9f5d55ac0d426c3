"""python build.py OUT E.safetensors [HEAD] [DEC]: model folder."""
import sys,json,numpy as np,torch
sys.path[:0]=['.','work']
from pathlib import Path
from dataclasses import replace
import mlx.core as mx
from mlx.utils import tree_unflatten
from safetensors.torch import load_file
from mlx_snapgen.checkpoint.model import load_pretrained
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from convert.pytorch.read_back import our_weights
from train.loop.assemble import save_model,round_autoencoder
from conv6 import autoencoder
out,ck=sys.argv[1],sys.argv[2];head=sys.argv[3] if len(sys.argv)>3 and sys.argv[3]!='-' else None;dec=sys.argv[4] if len(sys.argv)>4 and sys.argv[4]!='-' else None
table=sys.argv[5] if len(sys.argv)>5 else 'work/table.pt'
paint=sys.argv[6] if len(sys.argv)>6 else 'work/paint.safetensors'
base=load_pretrained(Path('start'),dtype=mx.float32)
I=torch.load('work/idx.pt',weights_only=False);w=load_file(ck)
X0=not __import__('os').environ.get('VPRED');cfg=replace(base.config.transformer,patch_size=2,latent_channels=36,prediction='x0' if X0 else 'velocity');net=EfficientDiT(cfg)
if 'P' in w: P=w['P']
else:
    P=torch.zeros(I['n'])
    for k,i in I['maps'][1.0].items(): P[i.reshape(-1)]=w['net.'+k].reshape(-1)
    for k,i in I['start'].items(): P[I['offsets'][k]:I['offsets'][k]+i.size]=P[torch.from_numpy(i.reshape(-1))]
net.update(tree_unflatten([(k,mx.array(P[o:o+int(np.prod(I['shapes'][k]))].reshape(I['shapes'][k]).numpy())) for k,o in I['offsets'].items()]))
perm=np.r_[0:16,28:36,16:28];allp=np.concatenate([perm+36*i for i in range(4)])
from mlx_snapgen.networks.layers import flat_parameters
fp=flat_parameters(net);ch=[]
for k,v in fp.items():
    if k.startswith('patch_embed') and v.shape[-1]==144 and v.ndim==2: ch.append((k,v[:,mx.array(allp)]))
    if k.startswith('head.linear') and v.shape[0]==144: ch.append((k,v[mx.array(allp)]*(-1 if X0 else 1)))
print([k for k,_ in ch],[ (k,v.shape) for k,v in fp.items() if k.startswith(('patch_embed','head'))]);net.update(tree_unflatten(ch))
e0=base.text_encoders[0];NLAY=1+max(int(k.split('.')[2]) for k in w if k.startswith('enc.layers.'));ec=replace(e0.config,num_layers=NLAY);e=e0.__class__(ec,e0._tokenizer);base=replace(base,config=replace(base.config,text_encoders=(ec,)),text_encoders=[e])
e.update(tree_unflatten(list(our_weights(e,{k[4:]:mx.array(v.numpy()) for k,v in w.items() if k.startswith('enc.')},Path(ck)).items())))
ae=autoencoder(table=table,paint=paint,head=head,dec=dec);round_autoencoder(ae)
config=replace(base.config,transformer=cfg,autoencoder=ae.config,few_step=None,sampler=replace(base.config.sampler,num_inference_steps=int(4),guidance_scale=1.5))
from train.data.stickers.vocabulary import vocabulary_file,FLUENT
c=replace(base,config=config,transformer=net,autoencoder=ae,vocabulary=vocabulary_file(150,FLUENT))
save_model(Path(out),c,bits=8)
