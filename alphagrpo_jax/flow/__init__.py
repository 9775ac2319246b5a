"""Rectified flow in a latent space: schedule, ODE and stochastic steps, guidance.

Convention: sigma is the share of noise, 1 is pure noise and 0 is the image;
`x_sigma = (1 - sigma) x_0 + sigma eps`, and a velocity `v = eps - x_0` points from data to noise.
"""
