"""`python -m metal_flash_attn bench`: attention of this package beside torch's own.

    options      the command line, from arguments to problems; needs no torch
    problem      what is measured, and how much work it is; needs no torch
    presets      the attention of well-known models, as data; needs no torch
    contenders   the calls: stock torch, and each tier that can serve
    timing       interleaved samples, medians and quartiles
    memory       the peak beyond inputs and outputs
    measure      from problems to results
    simulated    counters, where there is no GPU to time
    machine      what the figures were measured on
    tables       results for a terminal
    pictures     results as SVG and PNG

`bench/` of the repository, which makes README's tables, is built from the same pieces.
"""
