//! Executes Metal Shading Language kernels on a CPU and checks every access.
