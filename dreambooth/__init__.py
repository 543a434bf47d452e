"""DreamBooth (Ruiz et al., CVPR 2023): the method, free of any cluster framework."""
