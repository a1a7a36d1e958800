"""CRA-CNN (Liu et al., BMVC 2020) in JAX and Flax.

A ResNet learns to attend: a second ResNet looks at the attended crop and at what was
left out while training, and is thrown away afterwards.
"""
