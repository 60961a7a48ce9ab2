// Philox 4x32 with ten rounds: which weights dropout keeps.  The definition is in fastattn/dropout.py.
//
// No include guard: each target region reads this file into its own namespace, as scores.h.
#ifdef FASTATTN_ISA
namespace fastattn::cpu::FASTATTN_ISA {
#else
namespace fastattn::cuda {
#endif

// x is the counter, and then the four words of the seed's stream.  U is a word, or a vector of them, for which
// multiply(a, b, high, low) gives both words of a product.
template <class U>
FASTATTN_INLINE void philox(int64_t seed, U (&x)[4]) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
    U high0, low0, high1, low1;
    multiply(x[0], 0xD2511F53, high0, low0);
    multiply(x[2], 0xCD9E8D57, high1, low1);
    x[0] = high1 ^ x[1] ^ k0, x[1] = low1;
    x[2] = high0 ^ x[3] ^ k1, x[3] = low0;
  }
}
}
