"""The PyTorch side of comparisons: transformers' and diffusers' own modules, put together as the
specification says.

The only room that imports torch (extra [parity]); whoever asks for it does so inside a function.
"""
