import os,sys
os.environ.update(INIT=sys.argv[1],XP='1',THREADS='1',NU='0')
src=open('tr_y2.py').read().split("vs=[validation_scene")[0].replace("STEPS,LR=sys.argv[1],int(sys.argv[2]),float(sys.argv[3])","STEPS,LR='x',1,1e-4")
exec(src)
names=[n.name for n in FLUENT.nouns[:150]]
rng=np.random.default_rng(1)
pairs=[tuple(rng.choice(150,2,replace=False)) for _ in range(24)]
for f in ('a {a} above a {b}','a {a} is above a {b}','a {b} with a {a} above it','a {a} over a {b}','a {b} below a {a}','a {b} is below a {a}','a {a} with a {b} below it','a {b} under a {a}','a {a} at the top and a {b} at the bottom','top: a {a}, bottom: a {b}','a {a} to the left of a {b}','a {b} to the right of a {a}','a {b} with a {a} on its left'):
    ps=[f.format(a=names[i],b=names[j]) for i,j in pairs]
    tok,mask=tokens_of(ps);q=nets[1.0];q.resize((16,16))
    eps=torch.randn(24,36,16,16,generator=torch.Generator().manual_seed(3))
    with torch.no_grad(): x0=eps-run(1.,P,eps,torch.ones(24),tok,mask)
    a,_,_=things_at28(x0[:,K:].permute(0,2,3,1).numpy())
    r=[]
    for k,(i,j) in enumerate(pairs):
        h='left' not in f and 'right' not in f
        A=(a[k][1:7,5:11] if h else a[k][5:11,1:7]);Bq=(a[k][9:15,5:11] if h else a[k][5:11,9:15])
        m=lambda z:np.bincount(z.ravel(),minlength=300).argmax()-1
        x,y=m(A),m(Bq);r.append('ok' if (x,y)==(i,j) else 'swap' if (x,y)==(j,i) else 'aa' if x==y==i else 'bb' if x==y==j else 'a?' if x==i else '?b' if y==j else 'b?' if x==j else '?a' if y==i else '??')
    import collections;print(f,dict(collections.Counter(r).most_common()),flush=True)
