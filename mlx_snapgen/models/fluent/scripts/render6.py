import sys,numpy as np,torch,torch.nn.functional as F
sys.path.insert(0,'work');sys.path.insert(0,'work/int')
import ae as AE,paint as P
from tab import index,PAGE,NN
from train.data.stickers.semantics import codes
from train.data.stickers.vocabulary import FLUENT
from safetensors.torch import load_file
COL=torch.from_numpy(codes(4)).float()
def near(x):
    b,i=torch.einsum('bchw,nc->bhwn',x,COL).max(-1);return torch.where(b>2,i+1,0)
G=torch.zeros(25,4);G[:,3]=-1;G[0,:3]=-1
for k,(n,c) in enumerate(FLUENT.backgrounds.items()):
    if c is not None: G[k+1]=torch.tensor([*c,255])/127.5-1
G[0]=-1
class R(torch.nn.Module):
    def __init__(s,table='table.pt',paint='paint.safetensors',upper=None):
        super().__init__();w,c=AE.load('start');s.dec=AE.Decoder(w,c)
        if upper: s.dec.load_state_dict(load_file(upper))
        t=torch.load(table);s.T=torch.nn.Embedding.from_pretrained(t['table'],freeze=False,sparse=True);s.flat=torch.nn.Parameter(t['flat']);s.paint=P.Paint()
        s.paint.load_state_dict(load_file(paint))
    def forward(s,sem,own=False):
        i=index(sem);ok=i>=0
        z=torch.where(ok[...,None],s.T(i.clamp(min=0)),s.flat).permute(0,3,1,2)
        x=s.dec(z)
        if own: return x
        up=lambda m:m.repeat_interleave(16,-2).repeat_interleave(16,-1)
        c=near(sem[:,11:15]);g=near(sem[:,15:]);pm=ok&(c>0)
        if pm.any():
            m=up(pm);n=up((i//PAGE).clamp(min=0));cc=up(c-1)
            xp=x.permute(0,2,3,1);xp=xp.clone();xp[m]=s.paint(xp[m],n[m],cc[m]);x=xp.permute(0,3,1,2)
        gr=up(g);a=((x[:,3:]+1)/2).clamp(0,1);ground=G[gr].permute(0,3,1,2)
        return ((x+1)+(1-a)*(ground+1))-1
