"""Per-pixel recoloring: own premultiplied RGBA -> painted. args OUT SECONDS"""
import sys,time,os,numpy as np,torch,torch.nn as nn,torch.nn.functional as F
sys.path.insert(0,'work');sys.path.insert(0,'work/int');torch.set_num_threads(1)
from pathlib import Path
from safetensors.torch import save_file
from train.data.stickers.vocabulary import collection_in
from train.data.stickers.scenes import is_held_out_color
from train.data.stickers.render import sprite
coll=collection_in(Path('fluent/package/assets'));nouns=coll.nouns[:150];colors=list(coll.colors)
W=int(os.environ.get('W','48'))
class Paint(nn.Module):
    def __init__(s,n=150,c=len(colors)):
        super().__init__();s.pix=nn.Linear(4,W);s.thing=nn.Embedding(n,W);s.color=nn.Embedding(c,W);s.mid=nn.Linear(W,W);s.cmid=nn.Embedding(c,W);s.mid2=nn.Linear(W,W);s.out=nn.Linear(W,4)
        for e in(s.thing,s.color,s.cmid): nn.init.normal_(e.weight,std=.3)
    def forward(s,x,n,c):
        h=F.leaky_relu(s.pix(x)+s.thing(n)+s.color(c),.1);h=F.leaky_relu(s.mid(h)+s.cmid(c),.1);h=h+F.leaky_relu(s.mid2(h),.1)
        return x+s.out(h)
if __name__=='__main__':
    own,new,N,C,held=[],[],[],[],[]
    t0=time.time()
    for i,n in enumerate(nouns):
        if not n.recolor: continue
        f=lambda c:(lambda s:np.concatenate([s.rgb,255-np.minimum(255,s.keep*255//256).astype(np.uint8)],-1).reshape(-1,4))(sprite(n,c,96,collection=coll))
        o=f(None)
        for j,c in enumerate(colors):
            p=f(c);own.append(o);new.append(p);N.append(np.full(len(o),i,np.int16));C.append(np.full(len(o),j,np.int8));held.append(np.full(len(o),is_held_out_color(n,c)))
    own,new,N,C,held=map(np.concatenate,(own,new,N,C,held));vis=own[:,3]>0;own,new,N,C,held=own[vis],new[vis],N[vis],C[vis],held[vis]
    print(len(own),time.time()-t0,len(set(N)),'own vs new mse dB',-10*np.log10((((own.astype(float)-new)/255)**2).mean()))
    T=torch.from_numpy;own,new,N,C=T(own),T(new),T(N).long(),T(C).long();tr=np.flatnonzero(~held);he=np.flatnonzero(held)
    net=Paint();opt=torch.optim.Adam(net.parameters(),lr=5e-3);S=float(sys.argv[2]);t0=time.time();step=0;rng=np.random.default_rng(0);ls=[]
    g=lambda x:x.float()/127.5-1
    def ev(idx):
        i=T(rng.choice(idx,200000))
        with torch.no_grad(): e=(net(g(own[i]),N[i],C[i]).clamp(-1,1)-g(new[i])).square().mean().item()/4
        return -10*np.log10(e)
    while time.time()-t0<S:
        f=(time.time()-t0)/S;i=T(rng.choice(tr,16384))
        d=net(g(own[i]),N[i],C[i])-g(new[i]);loss=d.square().mean()+.1*d.abs().mean();opt.zero_grad();loss.backward()
        for q in opt.param_groups:q['lr']=5e-3*(1 if f<.3 else max(.01,(1-f)/.7))
        opt.step();step+=1
        if step%300==0: print(step,f'{time.time()-t0:.0f} train {ev(tr):.2f} held-out {ev(he):.2f} dB',flush=True)
    save_file(net.state_dict(),sys.argv[1])
    print('end',step,ev(tr),ev(he))
