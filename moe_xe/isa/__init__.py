"""SYCL source -> SPIR-V (spirv) -> Xe machine code (ocloc) -> what is in it (dump, listing). No device is touched."""
