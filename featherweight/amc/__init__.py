"""AMC: how much of each group of channels to keep, by a DDPG agent, evolution, chance, or an integer program.

He, Lin, Liu, Wang, Li & Han, "AMC: AutoML for Model Compression and Acceleration on Mobile Devices", ECCV 2018.
"""
