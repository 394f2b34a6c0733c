/* MKL takes its AVX-512 kernels on Intel's processors alone and asks these two functions whether it is on one.
   Loaded before it (LD_PRELOAD), they say so on any processor that has the instructions. */
int mkl_serv_intel_cpu(void) { return 1; }
int mkl_serv_intel_cpu_true(void) { return 1; }
