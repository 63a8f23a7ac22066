// The layers of a decoder for one new token of each of a few sequences, in one persistent kernel.
//
// Start at `decode_step`. A block runs on every multiprocessor until the step is done. One of its warps
// brings what does not depend on the new tokens: it walks through the rows of weights and the keys and values
// of old tokens that are this block's, layer after layer, and copies them into a ring in shared memory, as far
// ahead as the ring has room. The others compute: norm, product, attention, SiLU, each a phase
// whose numbers go to all blocks before the next begins. Plain torch: the operators of reference.py, one after
// the other.
//
// What blocks tell each other are words of 64 bits, read and written whole: a number, or two in bf16, and
// beside it a stamp that says of which product of which step it is. Who needs a word reads it until it has that
// stamp. So blocks never wait for each other in another way, and nothing must be seen in order. A word is
// written again a layer later, when its writer has read numbers of every block that came after it read this
// one: so every block computes rows of every product. (Stamps come again after 2^32 products, which takes
// hours: a word that nobody wrote since would have to be read in that very product.)
//
// A product goes through the tensor core with tokens as the 16 rows of its tile and 8 rows of the weight
// as its columns. Which of a tile's inner places holds which column does not matter as long as both sides
// agree: a thread takes 16 bytes of a weight's row, and the same columns of the token.
//
// Compiled by gpu_decode.py for one model's sizes: HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, TURNING,
// BLOCK_SIZE, LAYERS, CACHE, HEAD_NORMS, TOKENS, TOTALS (bytes of a token's sums of 32 columns each, for INT4),
// KINDS (a bit for each kind of layer that it has), STEP_BYTES, SHARED_BYTES.

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

#define NOTHING __int_as_float(0xff800000)  // minus infinity

enum Kind { BF16, E4M3, INT8, INT4_128, INT4_64, INT4_32 };  // INT4 by the columns of a scale
enum Product { QKV, OUT, GATE_UP, DOWN };

constexpr int WARPS = 15;     // that compute: with one that copies, each thread can have 128 registers
constexpr int THREADS = 32 * WARPS;
constexpr int TILE = 8;       // rows of a weight that are multiplied together
constexpr int UNITS = 29;     // of 64 bytes, at most, of a row that are copied together
constexpr int INT4_UNITS = 27;  // the same where their scales come along
constexpr int EACH = (UNITS + WARPS - 1) / WARPS;  // units of a piece that are a warp's
constexpr int STAGE = 16384;
constexpr int SLOTS = TOKENS <= 2 ? 16 : 8;  // tiles between two summations over the warps
constexpr int SCALES = TILE * UNITS * 64;  // where in a stage the scales of its rows lie, of 8-bit codes
constexpr int GROUP = HEADS / KV_HEADS;
constexpr int SPLIT_KEYS = 32;  // of a context, at least, that a block attends to
constexpr int TURN = 2 * WARPS;  // keys that a block attends to together
constexpr int ROW = HEAD_DIM * (CACHE == BF16 ? 2 : 1);  // bytes of a key
constexpr int TURNS = STAGE / (2 * ROW * TURN);  // whose keys and values a stage holds
constexpr int KEYS = TURNS * TURN;
constexpr int MOST_SPLITS = 16;

struct Linear {
    const u8* weight;   // [rows, columns], or INT4 in words as skinny.pack_int4 has them
    const void* scale;  // [rows] float32; INT4: [columns / group, rows] bf16
    const u16* bias;    // [rows] bf16
    const u8* maps;     // tensor maps of the weight, and of INT4's scales
    int rows, columns, kind;
};

// The kind of a layer, known beforehand where the model has one alone.
__device__ __forceinline__ int kind_of(const Linear& l) { return KINDS & (KINDS - 1) ? l.kind : __ffs(KINDS) - 1; }

__device__ __forceinline__ constexpr bool is_int4(int kind) { return kind >= INT4_128; }

// Scales of 128 columns of INT4.
__device__ __forceinline__ constexpr int scales_of(int kind) { return is_int4(kind) ? 1 << (kind - INT4_128) : 0; }

struct Layer {
    Linear linears[4];  // qkv, out, gate_up, down
    const u16 *input_norm, *post_norm, *q_norm, *k_norm;
    u8 *keys, *values;  // [slots, KV_HEADS, HEAD_DIM]
    const float *k_scale, *v_scale;
};

struct Step {
    const Layer* layers;
    const u16 *cos, *sin;     // [positions, TURNING]
    const u16* entering;      // [tokens, HIDDEN]
    u16* leaving;             // [tokens, HIDDEN]
    // words of two numbers: [tokens, HIDDEN], [tokens, (HEADS + 2 KV_HEADS) HEAD_DIM], [tokens, HEADS HEAD_DIM],
    // [tokens, INNER]
    u64 *stream, *qkv, *attended, *act;
    u64 *partial, *sums;      // words of a number: [tokens, splits, HEADS, HEAD_DIM], [tokens, splits, HEADS]
    const int *positions, *slots, *contexts, *tables;  // as Runner._inputs has them
    u32* counters;            // [2]: the stamp of the step's first product; blocks that are done, 0 before and after
    int width, splits, stages;
    int x_stride, x_bytes;    // of a token in shared memory, of all
    float eps, scale;         // scale: of scores, for exp2
};

struct Part {  // of a context, that one block attends to with the heads of one KV head
    int of, head, split, splits, first, end;
};

struct Shared {
    Step step;
    float partial[SLOTS][WARPS][TILE * TOKENS];
    float scale[SLOTS][TILE];  // of the rows that are multiplied
    float reduced[2][TOKENS][WARPS];
    float x_scale[TOKENS];
    int slot[TOKENS], context[TOKENS];
    Part first;      // that this block attends to, and the slots of its first keys
    int slots[KEYS];
    u16 turns[2][TOKENS][TURNING];  // cos and sin of the tokens' positions
    Layer layers[LAYERS];
};

static_assert(sizeof(Step) == STEP_BYTES && sizeof(Shared) == SHARED_BYTES, "as gpu_decode.py has them");

// Places in shared memory are offsets into it.
extern __shared__ __align__(128) u8 memory[];
template <typename T>
__device__ __forceinline__ T& shared(u32 at) { return *(T*)(memory + at); }
#define S shared<Shared>(0)

// With TRACE, the number of a block: when its first thread came to the end of each phase, and where it is in
// `attend`, in cycles (benchmarks/decode_kernel.py).
#ifdef TRACE
__device__ long long trace[4096];
__device__ long long inside[16];
#define MARK() if (blockIdx.x == TRACE && threadIdx.x == 0) trace[mark++] = clock64()
#define INSIDE(i) if (blockIdx.x == TRACE && threadIdx.x == 0) inside[i] += clock64()
#else
#define MARK()
#define INSIDE(i)
#endif

// ---- small things

__device__ __forceinline__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ float number(u16 bits) { return __uint_as_float((u32)bits << 16); }

__device__ __forceinline__ u16 to_bf16(float x) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

__device__ __forceinline__ float rounded(float x) { return number(to_bf16(x)); }

__device__ __forceinline__ u32 pair(float low, float high) {
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

__device__ __forceinline__ u16 to_e4m3(float low, float high) {
    u16 codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
    return codes;
}

__device__ __forceinline__ void from_e4m3(u16 codes, float& low, float& high) {
    u32 halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(codes));
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(low), "=f"(high) : "r"(halves));
}

__device__ __forceinline__ int to_int8(float x) { return max(-128, min(127, __float2int_rn(x))); }

// exp2 without the care for numbers next to zero
__device__ __forceinline__ float power(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// of pairs of bf16
__device__ __forceinline__ u32 larger(u32 a, u32 b) {
    u32 y;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

// of the warps that compute
__device__ __forceinline__ void together() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

__device__ __forceinline__ float warp_sum(float x) {
    for (int apart = 16; apart; apart >>= 1) x += __shfl_xor_sync(~0u, x, apart);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int apart = 16; apart; apart >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, apart));
    return x;
}

// ---- what blocks tell each other

__device__ __forceinline__ void put(u64* at, u32 data, u32 stamp) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(at), "l"((u64)stamp << 32 | data) : "memory");
}

// Whether a word is there.
__device__ __forceinline__ bool word(const u64* at, u32 stamp, u32& data) {
    u64 found;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(found) : "l"(at) : "memory");
    data = (u32)found;
    return (u32)(found >> 32) == stamp;
}

// The same of eight numbers in bf16.
__device__ __forceinline__ bool words(const u64* at, u32 stamp, uint4& data) {
    u64 a, b, c, d;
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(at) : "memory");
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(c), "=l"(d) : "l"(at + 2) : "memory");
    data = make_uint4((u32)a, (u32)b, (u32)c, (u32)d);
    return (((u32)(a >> 32) ^ stamp) | ((u32)(b >> 32) ^ stamp) | ((u32)(c >> 32) ^ stamp) | ((u32)(d >> 32) ^ stamp)) == 0;
}

// ---- the ring

struct Ring {
    u32 full, empty, data;  // barriers [stages] by their addresses, stages [stages, STAGE]
    int stages;
};

struct Place {  // where in the ring, and which time round
    int stage;
    u32 parity;
    __device__ __forceinline__ void advance(int stages) {
        if (++stage == stages) { stage = 0; parity ^= 1; }
    }
};

__device__ __forceinline__ void wait_for(u32 barrier, u32 parity) {
    u32 done;
    do {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    } while (!done);
}

__device__ __forceinline__ void copy(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// A box of a tensor map, at these numbers of its inner and of its outer side.
__device__ __forceinline__ void copy_box(u32 to, const u8* map, int inner, int outer, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(to), "l"(map), "r"(inner), "r"(outer), "r"(barrier) : "memory");
}

// How a row of a weight is cut into pieces, in units of 64 bytes: 32 bf16, 64 codes, 128 INT4 codes.
struct Cut {
    int units, most;  // of a row, of a piece: an odd number, so that rows in a stage lie in other banks
    __device__ __forceinline__ explicit Cut(const Linear& l) {
        const int kind = kind_of(l);
        units = kind == BF16 ? l.columns / 32 : is_int4(kind) ? (l.columns + 127) / 128 : l.columns / 64;
        const int room = is_int4(kind) ? INT4_UNITS : UNITS, pieces = (units + room - 1) / room;
        most = (units + pieces - 1) / pieces | 1;
    }
};

__device__ __forceinline__ int first_tile(int tiles, int block) {
    return (int)((long long)tiles * block / gridDim.x);
}

// When a stage is free: that so many bytes are to come.
__device__ __forceinline__ void expect(const Ring& ring, Place place, u32 bytes) {
    wait_for(ring.empty + 8 * place.stage, place.parity ^ 1);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(ring.full + 8 * place.stage), "r"(bytes) : "memory");
}

// By one lane of each warp that computes: it has read a stage.
__device__ __forceinline__ void release(const Ring& ring, Place place) {
    __syncwarp();
    if ((threadIdx.x & 31) == 0)
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(ring.empty + 8 * place.stage) : "memory");
}

// Copy this block's rows into the ring: for as many rows as are summed up together all pieces, one after the
// other. By one lane; all count. halves: 2: gate and up, by turns.
__device__ __forceinline__ Place feed(const Linear& l, int halves, const Ring& ring, Place place) {
    const Cut cut(l);
    const int tiles = l.rows / TILE / halves, last = first_tile(tiles, blockIdx.x + 1);
    const int kind = kind_of(l), scales = scales_of(kind);
    const bool row_scales = kind == E4M3 || kind == INT8;
    const int most = SLOTS / halves, rows = cut.most * (512 + 16 * scales);  // whole boxes: what is past a row's end counts
    for (int tile = first_tile(tiles, blockIdx.x); tile < last; tile += most) {
        const int used = min(most, last - tile) * halves;
        for (int begin = 0; begin < cut.units; begin += cut.most) {
            const bool with_scales = row_scales && begin == 0;
            for (int slot = 0; slot < used; slot++, place.advance(ring.stages)) {
                if (threadIdx.x & 31) continue;
                const int row = (halves == 2 ? slot % 2 * (l.rows / 2) + (tile + slot / 2) * TILE : (tile + slot) * TILE);
                const u32 barrier = ring.full + 8 * place.stage, to = address(memory + ring.data + place.stage * STAGE);
                expect(ring, place, rows + 32 * with_scales);
                if (is_int4(kind)) {
                    // inner: of 64 rows that lie together, in 8 bytes; outer: 128 columns of them
                    copy_box(to, l.maps, row % 64 * 8, row / 64 * cut.units + begin, barrier);
                    copy_box(to + cut.most * 512, l.maps + 128, row, begin * scales, barrier);
                } else {
                    copy_box(to, l.maps, begin * 8, row, barrier);
                    if (with_scales) copy(to + SCALES, (const float*)l.scale + row, 32, barrier);
                }
            }
        }
    }
    __syncwarp();
    return place;
}

// ---- products

// The tile of tokens is four registers of a thread: two of token lane / 4, and two of the token eight
// further on, which there is not: in their place are other columns of the same token, and what comes out
// there is what those columns give with the same part of the weight. So the four serve two products: of
// the first the upper half counts, of the second the lower one.
template <int KIND>
__device__ __forceinline__ void multiply(float (&c)[4], const uint4& a, u32 b0, u32 b1) {
    if constexpr (KIND == E4M3)  // as float16, which holds every code
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
    else if constexpr (KIND == INT8) {
        int(&i)[4] = reinterpret_cast<int(&)[4]>(c);
        asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+r"(i[0]), "+r"(i[1]), "+r"(i[2]), "+r"(i[3]) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
    } else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// Byte `byte` of two words, to its two nibbles of each word as pairs of bf16: in the mantissa of 128, so
// that they are 136 too large.
__device__ __forceinline__ void nibbles(u32 first, u32 second, int byte, u32& low, u32& high) {
    const u32 both = __byte_perm(first, second, byte | (4 + byte) << 8);
    asm("lop3.b32 %0, %1, 0x000F000F, 0x43004300, 0xEA;" : "=r"(low) : "r"(both));
    asm("lop3.b32 %0, %1, 0x000F000F, 0x43004300, 0xEA;" : "=r"(high) : "r"(both >> 4));
}

// Four E4M3 codes to float16.
__device__ __forceinline__ void halves_of(u32 codes, u32& low, u32& high) {
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b;}"
        : "=r"(low), "=r"(high) : "r"(codes));
}

// Bytes that a unit's columns take in shared memory, of a token.
__device__ __forceinline__ constexpr int unit_bytes(int kind) { return is_int4(kind) ? 256 : kind == E4M3 ? 128 : 64; }

// What a warp has of 8 rows times the tokens: the upper half of one product, the lower one of another.
struct Sums {
    float upper[4], lower[4];
};

// The tokens' columns of a piece that are a warp's, as its products take them, and INT4's sums of 32 columns.
template <int KIND>
struct Columns {
    static constexpr int VECTORS = unit_bytes(KIND) / 64;
    int count;  // of its units; they are WARPS apart
    uint4 x[EACH][VECTORS];
    float minus[EACH][is_int4(KIND) ? scales_of(KIND) : 1];  // what INT4's weights are too large by

    // x, totals: of the lane's token, at the piece's first unit.
    __device__ __forceinline__ Columns(u32 x_at, u32 totals, int units) {
        const int t = threadIdx.x & 3, warp = threadIdx.x >> 5;
        count = (units - warp + WARPS - 1) / WARPS;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (i >= count) break;
            const int unit = warp + i * WARPS;
#pragma unroll
            for (int j = 0; j < VECTORS; j++) x[i][j] = shared<const uint4>(x_at + unit * unit_bytes(KIND) + j * 64 + t * 16);
            if constexpr (is_int4(KIND)) {
                const float4 of32 = shared<const float4>(totals + unit * 16);
                const float sums[4] = {of32.x, of32.y, of32.z, of32.w};
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float more = -136.0f * sums[j];
                    float& all = minus[i][j * scales_of(KIND) / 4];
                    all = j * scales_of(KIND) % 4 ? all + more : more;
                }
            }
        }
    }
};

// A warp's units of 8 rows in a stage times the tokens. pitch: of rows.
template <int KIND>
__device__ __forceinline__ void add_product(Sums& sums, const Columns<KIND>& columns, u32 stage, int pitch) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    stage += (lane >> 2) * pitch + (lane & 3) * 16 + warp * 64;
    uint4 w[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++)
        if (i < columns.count) w[i] = shared<const uint4>(stage + i * WARPS * 64);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        if (i >= columns.count) break;
        if constexpr (KIND == E4M3) {
            u32 b[8];
            halves_of(w[i].x, b[0], b[1]), halves_of(w[i].y, b[2], b[3]);
            halves_of(w[i].z, b[4], b[5]), halves_of(w[i].w, b[6], b[7]);
            multiply<KIND>(sums.upper, columns.x[i][0], b[0], b[1]);
            multiply<KIND>(sums.lower, columns.x[i][0], b[2], b[3]);
            multiply<KIND>(sums.upper, columns.x[i][1], b[4], b[5]);
            multiply<KIND>(sums.lower, columns.x[i][1], b[6], b[7]);
        } else {
            multiply<KIND>(sums.upper, columns.x[i][0], w[i].x, w[i].y);
            multiply<KIND>(sums.lower, columns.x[i][0], w[i].z, w[i].w);
        }
    }
}

// The same of INT4.
template <int KIND>
__device__ __forceinline__ void add_int4(Sums& sums, const Columns<KIND>& columns, u32 stage, u32 scales) {
    constexpr int SCALED = scales_of(KIND);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    stage += lane * 16 + warp * 512, scales += (lane & 3) * 4 + warp * SCALED * 16;
    uint4 w[EACH];
    u32 scale[EACH][SCALED];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        if (i >= columns.count) break;
        w[i] = shared<const uint4>(stage + i * WARPS * 512);
#pragma unroll
        for (int j = 0; j < SCALED; j++) scale[i][j] = shared<const u32>(scales + (i * WARPS * SCALED + j) * 16);
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        if (i >= columns.count) break;
        Sums part = {};
#pragma unroll
        for (int byte = 0; byte < 4; byte++) {
            u32 b0, b1, d0, d1;
            nibbles(w[i].x, w[i].y, byte, b0, d0);
            nibbles(w[i].z, w[i].w, byte, b1, d1);
            multiply<BF16>(part.upper, columns.x[i][byte], b0, b1);
            multiply<BF16>(part.lower, columns.x[i][byte], d0, d1);
            if ((byte + 1) * SCALED % 4 == 0) {  // columns of one scale end here
                const u32 two = scale[i][byte * SCALED / 4];
                const float minus = columns.minus[i][byte * SCALED / 4];
                sums.upper[0] += (part.upper[0] + part.lower[2] + minus) * __uint_as_float(two << 16);
                sums.upper[1] += (part.upper[1] + part.lower[3] + minus) * __uint_as_float(two & 0xFFFF0000);
                part = {};
            }
        }
    }
}

__device__ __forceinline__ float gated(float gate, float up) {
    const float y = gate / (1.0f + power(-1.4426950408889634f * gate));
    return rounded(y) * up;
}

// The tokens in `x` times this block's rows. mine: the stream at the row of hidden states that is the thread's.
template <int KIND>
__device__ __forceinline__ Place product(const Linear& l, int what, u32 stamp, u16& mine, u16* leaving, u32 x, const Ring& ring, Place place) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const Cut cut(l);
    const bool paired = what == GATE_UP;  // a tile of gate, then the same of up
    const int tiles = l.rows / TILE >> paired, last = first_tile(tiles, blockIdx.x + 1);
    const int token = lane >> 2, known = min(token, TOKENS - 1);  // a row past the tokens is computed for nothing
    const u32 x_at = x + known * S.step.x_stride, totals = x + TOKENS * S.step.x_stride + known * TOTALS;
    // who finishes which number of a row
    const int n = threadIdx.x % TILE, of = threadIdx.x / TILE % TOKENS, my_slot = threadIdx.x / (TILE * TOKENS);
    for (int tile = first_tile(tiles, blockIdx.x); tile < last; tile += SLOTS >> paired) {
        const int used = min(SLOTS, (last - tile) << paired);
        const int my_row = (tile + (my_slot >> paired)) * TILE + n;
        const bool finishes = my_slot < used && !(paired && my_slot & 1);
        for (int begin = 0; begin < cut.units; begin += cut.most) {
            const Columns<KIND> columns(x_at + begin * unit_bytes(KIND), totals + begin * 16, min(cut.most, cut.units - begin));
            for (int slot = 0; slot < used; slot++, place.advance(ring.stages)) {
                const u32 stage = ring.data + place.stage * STAGE;
                Sums sums = {};
                wait_for(ring.full + 8 * place.stage, place.parity);
                if ((KIND == E4M3 || KIND == INT8) && begin == 0 && threadIdx.x < TILE)
                    S.scale[slot][lane] = shared<const float>(stage + SCALES + lane * 4);
                if constexpr (is_int4(KIND)) add_int4<KIND>(sums, columns, stage, stage + cut.most * 512);
                else add_product<KIND>(sums, columns, stage, cut.most * 64);
                release(ring, place);
                if (token >= TOKENS) continue;
                float2& kept = *(float2*)&S.partial[slot][warp][token * TILE + 2 * (lane & 3)];
                float2 two = begin ? kept : make_float2(0, 0);
                if (KIND == INT8) {
                    two.x = __int_as_float(__float_as_int(two.x) + __float_as_int(sums.upper[0]) + __float_as_int(sums.lower[2]));
                    two.y = __int_as_float(__float_as_int(two.y) + __float_as_int(sums.upper[1]) + __float_as_int(sums.lower[3]));
                } else {
                    two.x += sums.upper[0], two.y += sums.upper[1];
                    if (!is_int4(KIND)) two.x += sums.lower[2], two.y += sums.lower[3];
                }
                kept = two;
            }
        }
        together();
        u32 bits = 0;
        if (finishes) {
            float y[2] = {0, 0};
            for (int half = 0; half <= paired; half++) {
                float sum = 0;
                int exact = 0;
#pragma unroll
                for (int from = 0; from < WARPS; from++) {
                    const float part = S.partial[my_slot + half][from][of * TILE + n];
                    if (KIND == INT8) exact += __float_as_int(part);
                    else sum += part;
                }
                if (KIND == INT8) sum = exact;
                if (KIND == E4M3 || KIND == INT8) sum = sum * S.scale[my_slot + half][n] * S.x_scale[of];
                if (l.bias) sum += number(__ldg(l.bias + half * (l.rows / 2) + my_row));
                y[half] = rounded(sum);
            }
            if (what == GATE_UP) y[0] = gated(y[0], y[1]);
            if (what == OUT || what == DOWN) y[0] += number(mine);
            bits = to_bf16(y[0]);
            if (what == OUT || what == DOWN) mine = bits;
        }
        bits |= __shfl_down_sync(~0u, bits, 1) << 16;
        if (finishes && n % 2 == 0) {
            u64* to = what == QKV ? S.step.qkv : what == GATE_UP ? S.step.act : S.step.stream;
            const int columns = what == QKV ? l.rows : what == GATE_UP ? INNER : HIDDEN;
            if (leaving) *(u32*)(leaving + of * HIDDEN + my_row) = bits;
            else put(to + (of * columns + my_row) / 2, bits, stamp);
        }
        if (tile + (SLOTS >> paired) < last) together();  // the sums are written again
    }
    return place;
}

// ---- what a product takes

// Sum or largest of a number of each of the tokens from FIRST on over the block's threads. For a token not twice
// without `together` after it.
template <bool LARGEST, int FIRST, int COUNT>
__device__ __forceinline__ void over_threads(float (&value)[COUNT]) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int of = 0; of < COUNT; of++) {
        value[of] = LARGEST ? warp_max(value[of]) : warp_sum(value[of]);
        if (lane == 0) S.reduced[LARGEST][FIRST + of][warp] = value[of];
    }
    together();
#pragma unroll
    for (int of = 0; of < COUNT; of++) {
        const float found = lane < WARPS ? S.reduced[LARGEST][FIRST + of][lane] : 0.0f;  // no number is less
        value[of] = LARGEST ? warp_max(found) : warp_sum(found);
    }
}

__device__ __forceinline__ int splits_of(int context, int most) {
    return max(1, min(most, (context - 1 + SPLIT_KEYS - 1) / SPLIT_KEYS));
}

__device__ __forceinline__ float part_of(const uint4& v, int i) {
    const u32 word = i < 2 ? v.x : i < 4 ? v.y : i < 6 ? v.z : v.w;
    return __uint_as_float(i % 2 ? word & 0xFFFF0000 : word << 16);
}

__device__ __forceinline__ constexpr int vectors(int columns) {
    return ((columns + 127) / 128 * 128 + 8 * THREADS - 1) / (8 * THREADS);
}

// A thread's weights of a norm: read while blocks wait, for they come from far.
struct Norm {
    uint4 weight[vectors(HIDDEN)];

    __device__ __forceinline__ void read(const u16* from) {
#pragma unroll
        for (int i = 0; i < vectors(HIDDEN); i++) {
            const int at = (i * THREADS + threadIdx.x) * 8;
            if (at < HIDDEN) weight[i] = __ldg((const uint4*)(from + at));
        }
    }
};

// Tokens [tokens, columns] into shared memory as `kind` takes them, normed where NORMED. given: where they are,
// or else `source`, words with that stamp. COUNT of them, from FIRST on.
template <int COLUMNS, bool NORMED, int FIRST, int COUNT>
__device__ __forceinline__ void prepare_some(const u16* given, const u64* source, u32 stamp, const Norm& norm, int kind, u32 x) {
    constexpr int columns = COLUMNS;
    constexpr int VECTORS = vectors(columns);  // of 8, a thread's
    uint4 v[COUNT][VECTORS];
    const int padded = is_int4(kind) ? (columns + 127) / 128 * 128 : columns;
    bool there;
    do {
        there = true;
#pragma unroll
        for (int of = 0; of < COUNT; of++) {
#pragma unroll
            for (int i = 0; i < VECTORS; i++) {
                const int at = (i * THREADS + threadIdx.x) * 8;
                v[of][i] = make_uint4(0, 0, 0, 0);
                if (at >= columns) continue;
                if (given) v[of][i] = __ldg((const uint4*)(given + (FIRST + of) * columns + at));
                else there &= words(source + ((FIRST + of) * columns + at) / 2, stamp, v[of][i]);
            }
        }
    } while (!there);
    float value[COUNT];
    if constexpr (NORMED) {
#pragma unroll
        for (int of = 0; of < COUNT; of++) {
            value[of] = 0;
#pragma unroll
            for (int i = 0; i < VECTORS; i++)
#pragma unroll
                for (int j = 0; j < 8; j++) { const float y = part_of(v[of][i], j); value[of] += y * y; }
        }
        over_threads<false, FIRST, COUNT>(value);
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            const int at = (i * THREADS + threadIdx.x) * 8;
            if (at >= columns) break;
            const uint4 w = norm.weight[i];
#pragma unroll
            for (int of = 0; of < COUNT; of++) {
                const float turn = rsqrtf(value[of] / columns + S.step.eps);
                float y[8];
#pragma unroll
                for (int j = 0; j < 8; j++) y[j] = rounded(part_of(v[of][i], j) * turn) * part_of(w, j);
                v[of][i] = make_uint4(pair(y[0], y[1]), pair(y[2], y[3]), pair(y[4], y[5]), pair(y[6], y[7]));
            }
        }
    }
    const float largest = kind == E4M3 ? 448.0f : 127.5f;
    if (kind == E4M3 || kind == INT8) {
#pragma unroll
        for (int of = 0; of < COUNT; of++) {
            u32 most = 0;
#pragma unroll
            for (int i = 0; i < VECTORS; i++) {
                most = larger(most, larger(v[of][i].x & 0x7FFF7FFF, v[of][i].y & 0x7FFF7FFF));
                most = larger(most, larger(v[of][i].z & 0x7FFF7FFF, v[of][i].w & 0x7FFF7FFF));
            }
            value[of] = fmaxf(__uint_as_float(most << 16), __uint_as_float(most & 0xFFFF0000));
        }
        over_threads<true, FIRST, COUNT>(value);
    }
#pragma unroll
    for (int of = 0; of < COUNT; of++) {
        float by = 1;
        if (kind == E4M3 || kind == INT8) {
            const float scale = value[of] == 0 ? 1.0f : __fdiv_rn(value[of], largest);
            by = __fdiv_rn(1.0f, scale);
            if (threadIdx.x == 0) S.x_scale[FIRST + of] = scale;
        }
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            const int at = (i * THREADS + threadIdx.x) * 8;
            if (at / 256 * 256 >= padded) break;  // the same for a warp
            const u32 row = x + (FIRST + of) * S.step.x_stride;
            const uint4 w = v[of][i];
            const bool is_column = at < padded;
            // pairs of columns in the order 0, 2, 1, 3: see `multiply`
            if (kind == BF16) {
                if (is_column) shared<uint4>(row + at * 2) = make_uint4(w.x, w.z, w.y, w.w);
            } else if (is_int4(kind)) {
                // of 128 columns: four places of 64 bytes for two nibbles each, 16 bytes for a thread's four words
                const u32 to = row + at / 128 * 256 + at % 128 / 32 * 64 + at % 32 / 16 * 4 + at % 16 / 4 * 16;
                if (is_column) shared<u32>(to) = w.x, shared<u32>(to + 8) = w.y, shared<u32>(to + 16) = w.z, shared<u32>(to + 24) = w.w;
                float total = 0;
#pragma unroll
                for (int j = 0; j < 8; j++) total += part_of(w, j);
                total += __shfl_xor_sync(~0u, total, 1);
                total += __shfl_xor_sync(~0u, total, 2);
                if (is_column && threadIdx.x % 4 == 0) shared<float>(x + TOKENS * S.step.x_stride + (FIRST + of) * TOTALS + at / 32 * 4) = total;
            } else if (is_column) {
                u32 codes[2] = {0, 0};
#pragma unroll
                for (int j = 0; j < 8; j += 2) {
                    const float a = part_of(w, j) * by, b = part_of(w, j + 1) * by;
                    u32 two = kind == E4M3 ? to_e4m3(a, b) : (to_int8(a) & 0xFF) | (to_int8(b) & 0xFF) << 8;
                    codes[j / 4] |= two << (j % 4 * 8);
                }
                if (kind == INT8) {
                    const u32 to = row + at / 16 * 16 + at % 16 / 2;
                    shared<u32>(to) = codes[0], shared<u32>(to + 8) = codes[1];
                } else {  // as float16; of 64 columns, the first eight of each thread's 16, then the others
                    u32 h[4];
                    halves_of(codes[0], h[0], h[1]), halves_of(codes[1], h[2], h[3]);
                    shared<uint4>(row + at / 64 * 128 + at % 16 * 8 + at % 64 / 16 * 16) = make_uint4(h[0], h[2], h[1], h[3]);
                }
            }
        }
    }
}

// All tokens, as many together as registers hold. Every thread has read what was there before.
template <int COLUMNS, bool NORMED>
__device__ __forceinline__ void prepare(const u16* given, const u64* source, u32 stamp, const Norm& norm, int kind, u32 x) {
    constexpr int MOST = vectors(COLUMNS) > 1 && TOKENS > 2 ? 2 : TOKENS;
    prepare_some<COLUMNS, NORMED, 0, MOST>(given, source, stamp, norm, kind, x);
    if constexpr (TOKENS > MOST) prepare_some<COLUMNS, NORMED, MOST, TOKENS - MOST>(given, source, stamp, norm, kind, x);
    together();
}

// ---- attention

constexpr int SIZE = CACHE == BF16 ? 2 : 1;  // bytes of a number in the cache
constexpr int DIMS = HEAD_DIM / 16;          // sixteen lanes share a key
constexpr int WORDS = DIMS * SIZE / 4;

// DIMS numbers of a key or value.
struct Piece {
    u32 word[WORDS];

    // at: of the row in shared memory
    __device__ __forceinline__ void read(u32 at, int lane16) {
        at += lane16 * DIMS * SIZE;
        if constexpr (WORDS == 4) {
            const uint4 v = shared<const uint4>(at);
            word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
        } else if constexpr (WORDS == 2) {
            const uint2 v = shared<const uint2>(at);
            word[0] = v.x, word[1] = v.y;
        } else
            word[0] = shared<const u32>(at);
    }

    __device__ __forceinline__ void unpack(float (&to)[DIMS]) const {
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            const u32 w = word[i];
            if (CACHE == BF16) {
                to[2 * i] = __uint_as_float(w << 16), to[2 * i + 1] = __uint_as_float(w & 0xFFFF0000);
            } else if (CACHE == E4M3) {
                from_e4m3(w & 0xFFFF, to[4 * i], to[4 * i + 1]);
                from_e4m3(w >> 16, to[4 * i + 2], to[4 * i + 3]);
            } else {
#pragma unroll
                for (int j = 0; j < 4; j++) to[4 * i + j] = (float)((int)(w << (24 - 8 * j)) >> 24);
            }
        }
    }
};

// A number as it is after a stay in the cache, in units of the scale; what is stored.
__device__ __forceinline__ float coded(float x, float scale, u16& bits) {
    if (CACHE == BF16) {
        bits = to_bf16(x);
        return x;
    }
    x = __fdiv_rn(x, scale);
    if (CACHE == E4M3) {
        float low, high;
        bits = to_e4m3(x, 0) & 0xFF;
        from_e4m3(bits, low, high);
        return low;
    }
    const int code = to_int8(x);
    bits = code & 0xFF;
    return code;
}

// q, k or v of one head by one warp, when its words are there: normed and turned, to shared memory.
__device__ __forceinline__ void turn_head(const u64* head, u32 stamp, const u16* norm, bool turns, int of, float* to) {
    constexpr int EACH = HEAD_DIM / 32;  // of a lane: two next to each other, two that are 64 further on
    const int lane = threadIdx.x & 31;
    u32 two[EACH / 2];
    bool there;
    do {
        there = true;
#pragma unroll
        for (int i = 0; i < EACH / 2; i++) there &= word(head + lane + 32 * i, stamp, two[i]);
    } while (!there);
    float x[EACH], squares = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        x[i] = __uint_as_float(i % 2 ? two[i / 2] & 0xFFFF0000 : two[i / 2] << 16);
        squares += x[i] * x[i];
    }
    if (norm) {
        const float turn = rsqrtf(warp_sum(squares) / HEAD_DIM + S.step.eps);
#pragma unroll
        for (int i = 0; i < EACH; i++) x[i] = rounded(rounded(x[i] * turn) * number(__ldg(norm + 64 * (i / 2) + 2 * lane + i % 2)));
    }
#pragma unroll
    for (int i = 0; i < EACH; i += 2) *(float2*)(to + 32 * i + 2 * lane) = make_float2(x[i], x[i + 1]);
    __syncwarp();
    if (!turns) return;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int d = 64 * (i / 2) + 2 * lane + i % 2;
        if (d >= TURNING) continue;
        const float other = d < TURNING / 2 ? -to[d + TURNING / 2] : to[d - TURNING / 2];
        x[i] = rounded(rounded(x[i] * number(S.turns[0][of][d])) + rounded(other * number(S.turns[1][of][d])));
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < EACH; i += 2) *(float2*)(to + 32 * i + 2 * lane) = make_float2(x[i], x[i + 1]);
    __syncwarp();
}

__device__ __forceinline__ Part part_at(int unit) {
    const Step& p = S.step;
    Part part;
    part.split = unit % p.splits;
    part.head = unit / p.splits % KV_HEADS;
    part.of = unit / p.splits / KV_HEADS;
    const int before = max(0, S.context[part.of] - 1);  // tokens that are in the cache already
    part.splits = splits_of(S.context[part.of], p.splits);
    const int share = (before + part.splits - 1) / part.splits;
    part.first = part.split * share;
    part.end = part.split < part.splits ? min(before, part.first + share) : part.first;
    return part;
}

__device__ __forceinline__ int slot_at(int of, int place) {
    const Step& p = S.step;
    return __ldg(p.tables + (long long)of * p.width + place / BLOCK_SIZE) * BLOCK_SIZE + place % BLOCK_SIZE;
}

// What a lane has of the softmax of GROUP heads over the keys that it saw, and of the values' sum.
struct Softmax {
    float top[GROUP], total[GROUP], sum[GROUP][DIMS];

    __device__ __forceinline__ Softmax() {
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            top[g] = NOTHING, total[g] = 0;
#pragma unroll
            for (int i = 0; i < DIMS; i++) sum[g][i] = 0;
        }
    }

    // Keys and values of `turns` in a stage, the same number for a warp; of each those before `seen` count.
    // first: the lane's first key.
    // q: of the heads, in shared memory.
    __device__ __forceinline__ void add(const float* q, u32 stage, int first, int turns, int seen, float scale) {
        const int lane16 = threadIdx.x & 15;
        float score[TURNS][GROUP];
#pragma unroll
        for (int i = 0; i < TURNS; i++) {
            if (i >= turns) break;
            float k[DIMS];
            Piece piece;
            piece.read(stage + (first + i * TURN) * ROW, lane16);
            piece.unpack(k);
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                score[i][g] = 0;
#pragma unroll
                for (int d = 0; d < DIMS; d += 4) {
                    const float4 four = *(const float4*)(q + g * HEAD_DIM + lane16 * DIMS + d);
                    score[i][g] += four.x * k[d] + four.y * k[d + 1] + four.z * k[d + 2] + four.w * k[d + 3];
                }
            }
#pragma unroll
            for (int apart = 8; apart; apart >>= 1)
#pragma unroll
                for (int g = 0; g < GROUP; g++) score[i][g] += __shfl_xor_sync(~0u, score[i][g], apart);
        }
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            float higher = top[g];
#pragma unroll
            for (int i = 0; i < TURNS; i++)
                if (i < turns) {
                    score[i][g] = i < seen ? score[i][g] * scale : NOTHING;
                    higher = fmaxf(higher, score[i][g]);
                }
            const float base = higher == NOTHING ? 0.0f : higher, fade = power(top[g] - base);
            top[g] = higher;
            total[g] *= fade;
#pragma unroll
            for (int d = 0; d < DIMS; d++) sum[g][d] *= fade;
#pragma unroll
            for (int i = 0; i < TURNS; i++)
                if (i < turns) {
                    score[i][g] = power(score[i][g] - base);
                    total[g] += score[i][g];
                }
        }
#pragma unroll
        for (int i = 0; i < TURNS; i++) {
            if (i >= seen) break;  // what lies behind may be no number
            float v[DIMS];
            Piece piece;
            piece.read(stage + (KEYS + first + i * TURN) * ROW, lane16);
            piece.unpack(v);
#pragma unroll
            for (int g = 0; g < GROUP; g++)
#pragma unroll
                for (int d = 0; d < DIMS; d++) sum[g][d] += score[i][g] * v[d];
        }
    }
};

// Of the heads of one KV head this block's share of numbers, from all parts of the context.
__device__ __forceinline__ void join(const Part& part, u32 stamp) {
    const Step& p = S.step;
    constexpr int COUNT = GROUP * HEAD_DIM;
    static_assert(MOST_SPLITS == 16, "a part is half a warp's lane");
    const int share = ((COUNT + part.splits - 1) / part.splits + 1) / 2 * 2, first = part.split * share;
    const int end = min(COUNT, first + share), split = threadIdx.x % 16;
    for (int at = first; at < end; at += THREADS / 16) {
        const int i = at + threadIdx.x / 16;  // its neighbour is the warp's other half's
        float log = NOTHING, value = 0;
        if (i < end && split < part.splits) {
            const long long from = (long long)(part.of * p.splits + split) * HEADS + part.head * GROUP;
            u32 a, b;
            while (!(word(p.sums + from + i / HEAD_DIM, stamp, a) & word(p.partial + from * HEAD_DIM + i, stamp, b)));
            log = __uint_as_float(a), value = __uint_as_float(b);
        }
        float top = log;
#pragma unroll
        for (int apart = 8; apart; apart >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, apart));
        float weight = i < end ? power(log - top) : 0.0f, y = value * weight;
#pragma unroll
        for (int apart = 8; apart; apart >>= 1) {
            weight += __shfl_xor_sync(~0u, weight, apart);
            y += __shfl_xor_sync(~0u, y, apart);
        }
        y /= weight;
        const float next = __shfl_down_sync(~0u, y, 16);
        if (threadIdx.x % 32 == 0 && i < end)
            put(p.attended + ((part.of * HEADS + part.head * GROUP) * HEAD_DIM + i) / 2, pair(y, next), stamp);
    }
}

// Copy the keys and values that this block attends to into the ring, by one warp.
__device__ __forceinline__ Place feed_cache(const Layer& l, const Ring& ring, Place place) {
    const Step& p = S.step;
    const int lane = threadIdx.x & 31;
    for (int unit = blockIdx.x; unit < TOKENS * KV_HEADS * p.splits; unit += gridDim.x) {
        const bool known = unit == blockIdx.x;
        const Part part = known ? S.first : part_at(unit);
        for (int begin = part.first; begin < part.end; begin += KEYS, place.advance(ring.stages)) {
            const int count = min(KEYS, part.end - begin);
            const u32 barrier = ring.full + 8 * place.stage, to = address(memory + ring.data + place.stage * STAGE);
            if (lane == 0) expect(ring, place, count * 2 * ROW);
            __syncwarp();
            for (int i = lane; i < count; i += 32) {
                const long long slot = known && begin == part.first ? S.slots[i] : slot_at(part.of, begin + i);
                const long long from = (slot * KV_HEADS + part.head) * ROW;
                copy(to + i * ROW, l.keys + from, ROW, barrier);
                copy(to + (KEYS + i) * ROW, l.values + from, ROW, barrier);
            }
        }
    }
    return place;
}

// Attention of the new tokens over their contexts, keys and values of the new ones into the cache.
__device__ __forceinline__ Place attend(const Layer& l, u32 scratch, u32 stamp, const Ring& ring, Place place) {
    const Step& p = S.step;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, lane16 = lane & 15, each = lane >> 4;
    constexpr int WIDTH = (HEADS + 2 * KV_HEADS) * HEAD_DIM;
    float* heads = &shared<float>(scratch);               // [GROUP + 2, HEAD_DIM]: q, k, v
    float* results = heads + (GROUP + 2) * HEAD_DIM;      // [WARPS, GROUP, HEAD_DIM]
    float* tops = results + WARPS * GROUP * HEAD_DIM;     // [WARPS, GROUP]
    float* totals = tops + WARPS * GROUP;
    float* own = totals + WARPS * GROUP;                  // [GROUP]: scores of the new token
    const float k_scale = CACHE == BF16 ? 1.0f : __ldg(l.k_scale), v_scale = CACHE == BF16 ? 1.0f : __ldg(l.v_scale);
    const float scale = p.scale * k_scale;
    for (int unit = blockIdx.x; unit < TOKENS * KV_HEADS * p.splits; unit += gridDim.x) {
        const Part part = unit == blockIdx.x ? S.first : part_at(unit);
        if (part.split >= part.splits) continue;
        INSIDE(0);
        if (unit != blockIdx.x) together();
        if (warp < GROUP + 2) {
            const int head = warp < GROUP ? part.head * GROUP + warp : HEADS + (warp - GROUP) * KV_HEADS + part.head;
            const u16* norm = nullptr;
            if (HEAD_NORMS && warp <= GROUP) norm = warp < GROUP ? l.q_norm : l.k_norm;
            float* head_at = heads + warp * HEAD_DIM;
            turn_head(p.qkv + (part.of * WIDTH + head * HEAD_DIM) / 2, stamp, norm, warp <= GROUP, part.of, head_at);
            if (warp >= GROUP && part.split == 0) {
                const long long to = ((long long)S.slot[part.of] * KV_HEADS + part.head) * HEAD_DIM;
                u8* cache = warp == GROUP ? l.keys : l.values;
                for (int d = lane; d < HEAD_DIM; d += 32) {
                    u16 bits;
                    head_at[d] = coded(head_at[d], warp == GROUP ? k_scale : v_scale, bits);
                    if (CACHE == BF16) ((u16*)cache)[to + d] = bits;
                    else cache[to + d] = bits;
                }
            }
        }
        together();
        INSIDE(1);
        if (part.split == 0 && warp < GROUP) {
            float score = 0;
#pragma unroll
            for (int d = lane; d < HEAD_DIM; d += 32) score += heads[warp * HEAD_DIM + d] * heads[GROUP * HEAD_DIM + d];
            score = warp_sum(score);
            if (lane == 0) own[warp] = score * scale;
        }
        Softmax softmax;
        for (int begin = part.first; begin < part.end; begin += KEYS, place.advance(ring.stages)) {
            // a warp's two keys of a turn are neighbours
            const int first = warp * 2, left = part.end - begin - first;
            wait_for(ring.full + 8 * place.stage, place.parity);
            const int turns = min(TURNS, (left + TURN - 1) / TURN), seen = min(TURNS, (left - each + TURN - 1) / TURN);
            softmax.add(heads, ring.data + place.stage * STAGE, first + each, turns, seen, scale);
            release(ring, place);
        }
        INSIDE(3);
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            const float higher = fmaxf(softmax.top[g], __shfl_xor_sync(~0u, softmax.top[g], 16));
            const float fade = higher == NOTHING ? 0.0f : power(softmax.top[g] - higher);
            const float total = softmax.total[g] * fade;
            const float both = total + __shfl_xor_sync(~0u, total, 16);
#pragma unroll
            for (int i = 0; i < DIMS; i++) {
                const float y = softmax.sum[g][i] * fade;
                softmax.sum[g][i] = y + __shfl_xor_sync(~0u, y, 16);
            }
            if (each == 0)
#pragma unroll
                for (int i = 0; i < DIMS; i += 2)
                    *(float2*)(results + (warp * GROUP + g) * HEAD_DIM + lane16 * DIMS + i) = make_float2(softmax.sum[g][i], softmax.sum[g][i + 1]);
            if (lane == 0) tops[warp * GROUP + g] = higher, totals[warp * GROUP + g] = both;
        }
        INSIDE(4);
        together();
        INSIDE(5);
        for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS) {
            const int g = i / HEAD_DIM;
            float higher = part.split == 0 ? own[g] : NOTHING;
#pragma unroll
            for (int from = 0; from < WARPS; from++) higher = fmaxf(higher, tops[from * GROUP + g]);
            // the new token counts with the first part
            float sum = part.split == 0 ? power(own[g] - higher) : 0.0f, y = sum;
            if (part.split == 0) y *= heads[(GROUP + 1) * HEAD_DIM + i % HEAD_DIM];
#pragma unroll
            for (int from = 0; from < WARPS; from++) {
                const float weight = higher == NOTHING ? 0.0f : power(tops[from * GROUP + g] - higher);
                sum += totals[from * GROUP + g] * weight;
                y += results[from * GROUP * HEAD_DIM + i] * weight;
            }
            sum = sum == 0 ? 1.0f : sum;  // a part without keys; its `higher` says so
            y = y / sum * v_scale;
            const int head = part.head * GROUP + g;
            if (part.splits == 1) {
                const float next = __shfl_down_sync(~0u, y, 1);
                if (i % 2 == 0) put(p.attended + ((part.of * HEADS + head) * HEAD_DIM + i % HEAD_DIM) / 2, pair(y, next), stamp);
            } else {
                const long long to = (long long)(part.of * p.splits + part.split) * HEADS + head;
                put(p.partial + to * HEAD_DIM + i % HEAD_DIM, __float_as_uint(y), stamp);
                if (i % HEAD_DIM == 0) put(p.sums + to, __float_as_uint(higher + log2f(sum)), stamp);
            }
        }
        INSIDE(6);
        if (part.splits > 1) join(part, stamp);
        INSIDE(7);
    }
    return place;
}

// ---- the step

__device__ __forceinline__ const Linear& linear_of(int i) { return S.layers[i / 4].linears[i % 4]; }

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) decode_step(const __grid_constant__ Step given) {
    if (threadIdx.x == 0) S.step = given;
    for (int i = threadIdx.x; i < (int)(sizeof(S.layers) / 8); i += blockDim.x) ((u64*)S.layers)[i] = __ldg((const u64*)given.layers + i);
    if (threadIdx.x < TOKENS) {
        S.slot[threadIdx.x] = given.slots[threadIdx.x];
        S.context[threadIdx.x] = given.contexts[threadIdx.x];
    }
    for (int i = threadIdx.x; i < TOKENS * TURNING; i += blockDim.x) {
        const long long from = (long long)given.positions[i / TURNING] * TURNING + i % TURNING;
        S.turns[0][i / TURNING][i % TURNING] = __ldg(given.cos + from);
        S.turns[1][i / TURNING][i % TURNING] = __ldg(given.sin + from);
    }
    const u32 x = (sizeof(Shared) + 127) / 128 * 128, barriers = x + given.x_bytes;
    const u32 data = (barriers + 16 * given.stages + 127) / 128 * 128;
    const Ring ring{address(memory + barriers), address(memory + barriers + 8 * given.stages), data, given.stages};
    if (threadIdx.x == 0) {
        for (int i = 0; i < ring.stages; i++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(ring.full + 8 * i));
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(ring.empty + 8 * i), "n"(WARPS));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if (blockIdx.x < TOKENS * KV_HEADS * given.splits) {
        const Part part = part_at(blockIdx.x);
        if (threadIdx.x == 0) S.first = part;
        for (int i = threadIdx.x; i < min(KEYS, part.end - part.first); i += blockDim.x)
            S.slots[i] = slot_at(part.of, part.first + i);
    }
    __syncthreads();
    Place place{0, 0};
    if (threadIdx.x >= THREADS) {
        for (int i = 0; i < 4 * LAYERS; i++) {
            const Linear l = linear_of(i);
            place = feed(l, i % 4 == GATE_UP ? 2 : 1, ring, place);
            if (i % 4 == QKV) place = feed_cache(S.layers[i / 4], ring, place);
        }
        return;
    }
    [[maybe_unused]] int mark = 0;
    MARK();
    const u32 first_stamp = *(volatile u32*)given.counters;
    Norm norm;
    norm.read(S.layers[0].input_norm);
    // the thread's row of hidden states, as `product` has it
    const int my_row = first_tile(HIDDEN / TILE, blockIdx.x) * TILE + threadIdx.x / (TILE * TOKENS) * TILE + threadIdx.x % TILE;
    u16 mine = my_row < HIDDEN ? __ldg(given.entering + threadIdx.x / TILE % TOKENS * HIDDEN + my_row) : 0;
    for (int i = 0; i < 4 * LAYERS; i++) {
        const int what = i % 4;
        const u32 stamp = first_stamp + i, before = stamp - 1;
        const Layer& layer = S.layers[i / 4];
        const Linear l = linear_of(i);
        const int kind = kind_of(l);
        if (what == OUT) prepare<HEADS * HEAD_DIM, false>(nullptr, given.attended, before, norm, kind, x);
        else if (what == DOWN) prepare<INNER, false>(nullptr, given.act, before, norm, kind, x);
        else prepare<HIDDEN, true>(i ? nullptr : given.entering, given.stream, before, norm, kind, x);
        MARK();
        u16* leaving = i == 4 * LAYERS - 1 ? given.leaving : nullptr;
#define PRODUCT(KIND) \
    if ((KINDS >> KIND & 1) && kind == KIND) place = product<KIND>(l, what, stamp, mine, leaving, x, ring, place)
        PRODUCT(BF16);
        PRODUCT(E4M3);
        PRODUCT(INT8);
        PRODUCT(INT4_128);
        PRODUCT(INT4_64);
        PRODUCT(INT4_32);
        MARK();
        if (what == QKV) {
            place = attend(layer, x, stamp, ring, place);
            together();  // what it had in the tokens' place has been read
            MARK();
        }
        if (what == OUT) norm.read(layer.post_norm);
        if (what == DOWN && i + 1 < 4 * LAYERS) norm.read(S.layers[i / 4 + 1].input_norm);
    }
    if (threadIdx.x == 0 && atomicAdd(given.counters + 1, 1) == gridDim.x - 1)
        given.counters[0] = first_stamp + 4 * LAYERS, given.counters[1] = 0;
}
