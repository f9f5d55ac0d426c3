import sys,numpy as np,glob,os
from PIL import Image
d=sys.argv[1];n=int(sys.argv[3]) if len(sys.argv)>3 else 4
fs=sorted(glob.glob(d+'/*.png'),key=os.path.getmtime)
def on(f):
    a=np.asarray(Image.open(f).convert('RGBA')).astype(float);return a[...,:3]*a[...,3:]/255+(1-a[...,3:]/255)*np.array([238,238,246])
ims=[on(f) for f in fs]
while len(ims)%n: ims.append(np.full_like(ims[0],255))
Image.fromarray(np.concatenate([np.concatenate(ims[k:k+n],1) for k in range(0,len(ims),n)]).astype(np.uint8)).save(sys.argv[2])
