// Prints what cpu_decode.cpp computes of numbers that are the same on every machine: products of every format
// for 1, 7 and 50 inputs, and the logits of steps of a small model with prompts. test_cpu_builds.py compares
// what builds for different processors print.
#include "cpu_decode.cpp"

#include <cstdio>

namespace {
uint32_t state = 1;
uint32_t draw() { return state = state * 1664525u + 1013904223u, state >> 8; }
float uniform() { return float(draw()) / float(1 << 23) - 1.0f; }

template <class T> std::vector<T> filled(size_t count, T (*make)()) {
  std::vector<T> values(count);
  for (T &value : values) value = make();
  return values;
}
bf16 number() { return to_bf16(uniform()); }
float step() { return 0.01f + 0.001f * uniform(); }
bf16 small_step() { return to_bf16(step()); }
uint8_t byte() { return draw() & 255; }
uint8_t e4m3() { return draw() & 128 | draw() % 0x7f; }  // all but NaN
uint8_t e5m2() { return draw() & 128 | draw() % 0x60; }

struct Made {
  std::vector<uint8_t> weight;
  std::vector<float> scale;
  std::vector<bf16> groups, zero;
  std::vector<int32_t> sums;
  Linear linear;
};

void make(Made &to, int format, int rounding, bool zeros, int out, int in) {
  const size_t count = size_t(out) * in;
  to.weight = filled<uint8_t>(count * (format == BF16 ? 2 : 1), format == E4M3 ? e4m3 : format == E5M2 ? e5m2 : byte);
  if (format == BF16)
    for (size_t i = 0; i < count; ++i) ((bf16 *)to.weight.data())[i] = to_bf16(uniform() * 0.1f);
  to.scale = filled<float>(out, step);
  to.groups = filled<bf16>(count / 32, small_step), to.zero = filled<bf16>(count / 32, number);
  to.sums.assign(out, 0);
  for (size_t i = 0; i < count; ++i) to.sums[i / in] += int8_t(to.weight[i]);
  const void *scale = format == INT4 ? (const void *)to.groups.data() : to.scale.data();
  to.linear = {to.weight.data(), scale, zeros ? to.zero.data() : nullptr, to.sums.data(), nullptr,
               out, in, format, 32 + 32 * (in % 128 == 0), rounding, 0.01f};
}

void print(const char *name, const float *values, size_t count) {
  printf("%s:", name);
  for (size_t i = 0; i < count; ++i) printf(" %.9g", values[i]);
  printf("\n");
}

void products(const char *name, int format, int rounding, bool zeros) {
  for (int in : {96, 256}) {
    if (format == INT4 && in % 64) continue;
    Made made;
    make(made, format, rounding, zeros, 27, in);
    for (int rows : {1, 7, 50}) {
      std::vector<bf16> x = filled<bf16>(size_t(rows) * in, number);
      std::vector<float> y(rows * 27);
      multiply_rows(&made.linear, x.data(), rows, y.data(), 1, 2);
      print(name, y.data(), y.size());
    }
  }
}

// Two layers, four heads over two, a block of the cache for each 4 tokens
void steps(const char *name, int format, int rounding) {
  constexpr int HIDDEN = 64, INNER = 128, HEADS = 4, KV = 2, D = 16, VOCAB = 40, SLOTS = 64;
  std::vector<bf16> norm(HIDDEN, to_bf16(1.0f));
  std::vector<bf16> cos = filled<bf16>(SLOTS * D, number), sin = filled<bf16>(SLOTS * D, number);
  Made made[2][7], head;
  std::vector<bf16> cache[2][2];
  Layer layers[2] = {};
  make(head, format, rounding, false, VOCAB, HIDDEN);
  for (int i = 0; i < 2; ++i) {
    const int sizes[7][2] = {{HEADS * D, HIDDEN}, {KV * D, HIDDEN}, {KV * D, HIDDEN}, {HIDDEN, HEADS * D},
                             {INNER, HIDDEN}, {INNER, HIDDEN}, {HIDDEN, INNER}};
    Linear *to[7] = {&layers[i].q, &layers[i].k, &layers[i].v, &layers[i].out,
                     &layers[i].gate, &layers[i].up, &layers[i].down};
    for (int j = 0; j < 7; ++j) make(made[i][j], format, rounding, false, sizes[j][0], sizes[j][1]), *to[j] = made[i][j].linear;
    for (auto &part : cache[i]) part.assign(SLOTS * KV * D, 0);
    layers[i].input_norm = layers[i].post_norm = norm.data();
    layers[i].keys = cache[i][0].data(), layers[i].values = cache[i][1].data();
    layers[i].cos = cos.data(), layers[i].sin = sin.data();
  }
  Model model{norm.data(), layers, head.linear, 2, HIDDEN, INNER, HEADS, KV, D, 4, 2, D,
              0, 0, 0, 0, 0, 0, 0, 0, 1e-5f, 1, 0.25f, 1};
  // a prompt of 3 and one of 20, then one token of each
  int32_t tables[2][8] = {{5, 2, 0, 0, 0, 0, 0, 0}, {1, 3, 4, 6, 7, 8, 9, 10}};
  auto run = [&](std::vector<int> from, std::vector<int> counts) {
    std::vector<int32_t> positions, slots, starts{0};
    for (int i = 0; i < 2; ++i) {
      for (int at = from[i]; at < from[i] + counts[i]; ++at) {
        positions.push_back(at);
        slots.push_back(tables[i][at / 4] * 4 + at % 4);
      }
      starts.push_back(positions.size());
    }
    std::vector<bf16> entering = filled<bf16>(positions.size() * HIDDEN, number), logits(2 * VOCAB);
    Batch batch{entering.data(), positions.data(), slots.data(), starts.data(), tables[0], logits.data(), nullptr,
                int(positions.size()), 2, 8};
    decode_step(&model, &batch);
    std::vector<float> values;
    for (bf16 x : logits) values.push_back(to_float(x));
    print(name, values.data(), values.size());
  };
  run({0, 0}, {3, 20});
  run({3, 20}, {1, 1});
}
}  // namespace

int main() {
  products("product bf16", BF16, NONE, false);
  products("product int8", INT8, TOKEN, false);
  products("product int8 of 16 bits", INT8, NONE, false);
  products("product int8 by block", INT8, BLOCKS, false);
  products("product int4", INT4, NONE, false);
  products("product int4 with zero points", INT4, NONE, true);
  products("product int4 by block", INT4, BLOCKS, false);
  products("product int4 by block with zero points", INT4, BLOCKS, true);
  products("product int4 by token", INT4, TOKEN, false);
  products("product e4m3", E4M3, NONE, false);
  products("product e4m3 by token", E4M3, TOKEN, false);
  products("product e4m3 static", E4M3, STATIC, false);
  products("product e5m2", E5M2, NONE, false);
  steps("step bf16", BF16, NONE);
  steps("step int8", INT8, TOKEN);
  steps("step int8 by block", INT8, BLOCKS);
  steps("step int4 by block", INT4, BLOCKS);
  steps("step e4m3", E4M3, TOKEN);
}
