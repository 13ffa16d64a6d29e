// prepend: xe.hpp
// messages of 32 lanes in a sub-group of 16: the second half of the addresses and of the data is the vectors' second element
KERNEL(1) simd32_copy64(const long *S, const int *index, long *D) {
  auto lane = syclext::this_work_item::get_sub_group().get_local_linear_id();
  vec<unsigned long, 2> from, to;
  vec<long, 2> v;
  for (int i = 0; i < 2; i++) { from[i] = (unsigned long)(S + index[lane + 16 * i]); to[i] = (unsigned long)(D + lane + 16 * i); }
  ASM("lsc_load.ugm (M1_NM, 32) %0:d64 flat[%1]:a64" : "=rw"(v) : "rw"(from));
  v += 1;
  ASM("lsc_store.ugm (M1_NM, 32) flat[%0]:a64 %1:d64" ::"rw"(to), "rw"(v));
}
KERNEL(1) simd32_copy32(const int *S, const int *index, int *D) {
  auto lane = syclext::this_work_item::get_sub_group().get_local_linear_id();
  vec<unsigned long, 2> from, to;
  vec<int, 4> v;      // two dwords an address: lanes 0..31 of the first, then of the second
  for (int i = 0; i < 2; i++) { from[i] = (unsigned long)(S + 2 * index[lane + 16 * i]); to[i] = (unsigned long)(D + 2 * (lane + 16 * i)); }
  ASM("lsc_load.ugm (M1_NM, 32) %0:d32x2 flat[%1]:a64" : "=rw"(v) : "rw"(from));
  ASM("lsc_store.ugm (M1_NM, 32) flat[%0]:a64 %1:d32x2" ::"rw"(to), "rw"(v));
}

// one contiguous block of 64 dwords, or of 32 qwords (a uniform "rw.u" address would share its register with others, and both
// messages would then take the first one: IGC does not align it)
KERNEL(1) block_copy32(const int *S, int *D) {
  vec<int, 4> v;
  ASM("lsc_load.ugm (M1_NM, 1) %0:d32x64t flat[%1]:a64" : "=rw"(v) : "rw"(S));
  ASM("lsc_store.ugm (M1_NM, 1) flat[%0]:a64 %1:d32x64t" ::"rw"(D), "rw"(v));
}
KERNEL(1) block_copy64(const long *S, long *D) {
  vec<long, 2> v;
  ASM("lsc_load.ugm (M1_NM, 1) %0:d64x32t flat[%1]:a64" : "=rw"(v) : "rw"(S));
  ASM("lsc_store.ugm (M1_NM, 1) flat[%0]:a64 %1:d64x32t" ::"rw"(D), "rw"(v));
}

// 16 x 8 dwords as they are; two blocks of 8 x 8 side by side; 32 x 8 words
KERNEL(1) b2d_copy32(int *S, int *D, int w, int h, int x0, int y0) {
  vec<int, 8> v;
  Block<32, 8, 16, 1> s(S, w, h, w), d(D, 16, 8, 16);
  s.at(x0, y0);
  s.load(v);
  d.store(v);
}
KERNEL(1) b2d_array32(int *S, int *D, int w, int h, int x0, int y0) {
  vec<int, 8> v;      // block c: 8 rows of 8 dwords, two rows in a register
  Block<32, 8, 8, 2> s(S, w, h, w);
  s.at(x0, y0);
  s.load(v);
  for (int i = 0; i < 8; i++) D[i * 16 + syclext::this_work_item::get_sub_group().get_local_linear_id()] = v[i];
}
KERNEL(1) b2d_copy16(short *S, short *D, int w, int h, int x0, int y0) {
  vec<short, 16> v;
  Block<16, 8, 32, 1> s(S, w, h, w), d(D, 32, 8, 32);
  s.at(x0, y0);
  s.load(v);
  d.store(v);
}

// many arguments: a null pointer is not used, every other one is
KERNEL(1) arguments(long *D, const int *p0, int a0, const long *p1, long a1, const int *p2, int a2, const long *p3, long a3, const int *p4, int a4,
                    const long *p5, long a5, const int *p6, int a6, const long *p7, long a7, const int *p8, int a8, const long *p9, long a9,
                    const int *p10, int a10, const long *p11, long a11, const int *p12, int a12, const long *p13, long a13) {
  long i = syclext::this_work_item::get_nd_item<1>().get_global_linear_id();
  D += 28 * i;
  int n = 0;
  auto put = [&](auto *p, long a) { D[n++] = p ? p[i] : -1; D[n++] = a; };
  put(p0, a0), put(p1, a1), put(p2, a2), put(p3, a3), put(p4, a4), put(p5, a5), put(p6, a6);
  put(p7, a7), put(p8, a8), put(p9, a9), put(p10, a10), put(p11, a11), put(p12, a12), put(p13, a13);
}
