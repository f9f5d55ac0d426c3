import sys;ck,out,n=sys.argv[1],sys.argv[2],int(sys.argv[3]) if len(sys.argv)>3 else 128
src=sys.argv[4] if len(sys.argv)>4 else 'val.npz'
sys.argv=['head.py','x','0','0'];sys.path.insert(0,'work')
import numpy as np,torch,head as H
from safetensors.torch import load_file
net=H.H();net.load_state_dict(load_file(ck));d=np.load(src)
pr=np.r_[0:8,11:19,8:11]
with torch.no_grad(): o=net(torch.from_numpy(d['lat'][:n]).float().permute(0,3,1,2)).permute(0,2,3,1).numpy()[...,pr]
np.savez(out,o=o,s=d['sem'][:n].astype(np.float32)[...,pr],lat=d['lat'][:n])
