import sys,numpy as np,torch
sys.path.insert(0,'work');sys.path.insert(0,'work/int')
from tab import index,PAGE,NN
tot=torch.zeros(NN*PAGE,32);cnt=torch.zeros(NN*PAGE);fl=torch.zeros(32);fn=0
for f in sys.argv[1:]:
    d=np.load(f)
    for a in range(0,len(d['lat']),256):
        l=torch.from_numpy(d['lat'][a:a+256]).float();s=torch.from_numpy(d['sem'][a:a+256]).float().permute(0,3,1,2);i=index(s)
        tr=s[:,15:].abs().amax(1)==0;own=tr&(s[:,11:15].abs().amax(1)==0)
        ok=(i>=0);w=torch.where(own,1.,1e-3)[ok]
        tot.index_add_(0,i[ok],l[ok]*w[:,None]);cnt.index_add_(0,i[ok],w);e=(i<0)&tr;fl+=l[e].sum(0);fn+=e.sum()
print('own',(cnt>.9).float().mean(),'median',cnt.median())
torch.save(dict(table=tot/cnt.clamp(min=1e-9)[:,None],flat=fl/fn),'table.pt')
