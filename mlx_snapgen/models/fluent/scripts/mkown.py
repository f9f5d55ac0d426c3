import os,zlib,sys,numpy as np
sys.path.insert(0,'.')
from PIL import Image
from pathlib import Path
from train.data.stickers.strangers import strangers
o=[n for n in strangers(Path('fluent/package/assets'),200) if zlib.crc32((n.name+'.webp').encode())%10==0 and n.name.startswith('1f9')]
print([ (n.name,n.emoji) for n in o])
name=sys.argv[1];im=Image.open(f'fluent/package/assets/{name}.webp').convert('RGBA');im=im.crop(im.getbbox())
os.makedirs('work/own',exist_ok=True);rng=np.random.default_rng(0)
for i in range(16):
    s=int(rng.choice([128,160,192]));f=s/max(im.size);g=im.resize((int(im.width*f),int(im.height*f)),Image.LANCZOS)
    bg,w=[((0,0,0,0),''),((44,96,214,255),' on a blue background'),((255,222,70,255),' on a yellow background')][rng.choice(3,p=[.6,.2,.2])]
    c=Image.new('RGBA',(256,256),bg);c.alpha_composite(g,(int((256-g.width)/2),int((256-g.height)/2)));c.save(f'work/own/{i:02d}.png');open(f'work/own/{i:02d}.txt','w').write('a zorbo'+w)
