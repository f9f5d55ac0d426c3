import sys,numpy as np,torch,torch.nn as nn,torch.nn.functional as F
sys.path.insert(0,'work/int')
from pathlib import Path
def load(folder):
    from mlx_snapgen.checkpoint.model import load_autoencoder
    from mlx_snapgen.networks.layers import flat_parameters
    import mlx.core as mx
    a=load_autoencoder(Path(folder));return {k:torch.from_numpy(np.array(v.astype(mx.float32))) for k,v in flat_parameters(a).items()},a.config
class RB(nn.Module):
    def __init__(s,c):
        super().__init__();s.w=nn.Parameter(torch.ones(c));s.conv1=nn.Conv2d(c,c,3,padding=1);s.conv2=nn.Conv2d(c,c,3,padding=1)
    def forward(s,x):
        n=x*torch.rsqrt((x*x).mean(1,keepdim=True)+1e-5)*s.w.view(1,-1,1,1)
        return x+s.conv2(F.leaky_relu(s.conv1(n),.1))
    def load(s,w,p):
        s.w.data=w[p+'.norm.weight'].clone()
        for n in('conv1','conv2'):
            getattr(s,n).weight.data=w[f'{p}.{n}.weight'].permute(0,3,1,2).contiguous();getattr(s,n).bias.data=w[f'{p}.{n}.bias'].clone()
        return s
def s2d(x,f):
    b,c,h,w=x.shape
    return x.reshape(b,c,h//f,f,w//f,f).permute(0,3,5,1,2,4).reshape(b,f*f*c,h//f,w//f)
def d2s(x,f):
    b,c,h,w=x.shape
    return x.reshape(b,f,f,c//(f*f),h,w).permute(0,3,4,1,5,2).reshape(b,c//(f*f),h*f,w*f)
def lin(x,w,b): return F.conv2d(x,w[:,:,None,None],b)
class Encoder(nn.Module):
    def __init__(s,w,cfg):
        super().__init__();ch=cfg.encoder_channels;s.wt=w;s.n=len(ch)
        for i,(c,k) in enumerate(zip(ch,cfg.encoder_blocks),1):
            s.add_module(f'b{i}',nn.Sequential(*[RB(c).load(w,f'encoder.blocks{i}.{j}') for j in range(k)]))
        s.cfg=cfg
        s.mean=torch.tensor(cfg.latents_mean).view(1,-1,1,1);s.std=torch.tensor(cfg.latents_std).view(1,-1,1,1)
    def feats(s,x):
        w=s.wt;x=lin(s2d(x,4),w['encoder.patch.weight'],w['encoder.patch.bias'])
        for i in range(1,s.n+1):
            if i>1:
                d='encoder.down' if i==2 else f'encoder.down{i-1}'
                x=lin(s2d(x,2),w[d+'.weight'],w[d+'.bias'])
            x=getattr(s,f'b{i}')(x)
        return x
    def head(s,x):
        z=lin(x,s.wt['encoder.out.weight'],s.wt['encoder.out.bias']).chunk(2,1)[0]
        return (z-s.mean)/s.std
    def forward(s,x): return s.head(s.feats(x))
class Decoder(nn.Module):
    def __init__(s,w,cfg):
        super().__init__();ch=cfg.decoder_channels;s.n=len(ch);s.cfg=cfg
        s.inp=nn.Conv2d(cfg.latent_channels,ch[0],3,padding=1);s.out=nn.Conv2d(ch[-1],4*cfg.picture_channels,3,padding=1)
        for n in('inp','out'):
            getattr(s,n).weight.data=w[f'decoder.{n}.weight'].permute(0,3,1,2).contiguous();getattr(s,n).bias.data=w[f'decoder.{n}.bias'].clone()
        for i,(c,k) in enumerate(zip(ch,cfg.decoder_blocks),1):
            s.add_module(f'b{i}',nn.Sequential(*[RB(c).load(w,f'decoder.blocks{i}.{j}') for j in range(k)]))
            if i<s.n:
                u=nn.Conv2d(c,4*ch[i],1);u.weight.data=w[f'decoder.up{i}.weight'][:,:,None,None].clone();u.bias.data=w[f'decoder.up{i}.bias'].clone();s.add_module(f'up{i}',u)
        s.register_buffer('mean',torch.tensor(cfg.latents_mean).view(1,-1,1,1));s.register_buffer('std',torch.tensor(cfg.latents_std).view(1,-1,1,1))
    def forward(s,z):
        x=s.inp(z*s.std+s.mean)
        for i in range(1,s.n+1):
            x=getattr(s,f'b{i}')(x)
            if i<s.n: x=d2s(getattr(s,f'up{i}')(x),2)
        return d2s(s.out(x),2)
def pics(u8): return torch.from_numpy(u8).permute(0,3,1,2).float()/127.5-1
if __name__=='__main__':
    import time,mlx.core as mx
    torch.set_num_threads(1)
    w,cfg=load('start');e=Encoder(w,cfg);d=Decoder(w,cfg)
    from mlx_snapgen.checkpoint.model import load_autoencoder
    a=load_autoencoder(Path('start'))
    x=np.random.default_rng(0).integers(0,255,(2,64,64,4)).astype(np.uint8)
    from mlx_snapgen.pictures import from_uint8
    z=np.array(a.encode(from_uint8(x)));
    with torch.no_grad():
        zt=e(pics(x));print(abs(zt.permute(0,2,3,1).numpy()-z).max())
        p=np.array(a.decode(mx.array(z)));print(abs(d(zt).permute(0,2,3,1).numpy()-p).max())
        X=torch.randn(16,4,256,256).to(memory_format=torch.channels_last)
        for dt in(0,1):
          for _ in range(2):
            t=time.time()
            with torch.autocast('cpu',torch.bfloat16,enabled=bool(dt)): zz=e(X)
            t1=time.time()
            with torch.autocast('cpu',torch.bfloat16,enabled=bool(dt)): d(zz.float())
            print(dt,t1-t,time.time()-t1)
