// Runs the index functions of the kernels over everything they are used for, with a plain compiler: each element of a
// tile is named exactly once, accesses of a warp meet no bank twice, fragments multiply to the product they stand for.
#include "layout.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <set>
#include <vector>

using namespace lorafmt;

static void expect(bool good, const char* what, int a = 0, int b = 0) {
    if (!good) {
        printf("failed: %s (%d, %d)\n", what, a, b);
        exit(1);
    }
}

// Each chunk of a tile has a place of its own, inside the tile, in its own row.
static void chunks_are_a_permutation() {
    std::set<int> seen;
    for (int row = 0; row < 256; ++row)
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            const int at = chunk_offset(row, chunk);
            expect(at % kChunkBytes == 0 && at / kRowBytes == row, "chunk in its row", row, chunk);
            expect(seen.insert(at).second, "chunk placed once", row, chunk);
        }
    expect(seen.size() == 256u * kChunks, "all chunks");
}

// The 8 rows that ldmatrix reads at a time lie in 8 groups of 4 banks; so do 8 chunks of a row.
static void matrices_meet_no_bank_twice() {
    for (int first = 0; first < 256; first += 8)
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            std::set<int> banks;
            for (int row = first; row < first + 8; ++row) banks.insert(chunk_offset(row, chunk) / kChunkBytes % 8);
            expect(banks.size() == 8, "bank conflict of a matrix", first, chunk);
        }
    for (int row = 0; row < 8; ++row) {
        std::set<int> banks;
        for (int chunk = 0; chunk < kChunks; ++chunk) banks.insert(chunk_offset(row, chunk) / kChunkBytes % 8);
        expect(banks.size() == 8, "bank conflict of a row", row);
    }
}

// The lanes' addresses for ldmatrix.x4 are each 8 x 8 matrix's rows in order.
static void lanes_name_matrices() {
    for (int lane = 0; lane < 32; ++lane) {
        const int matrix = lane / 8, row = lane % 8;
        expect(a_lane_row(lane) == row + 8 * (matrix % 2) && a_lane_chunk(lane) == matrix / 2, "A", lane);
        expect(b_lane_row(lane) == row + 8 * (matrix / 2) && b_lane_chunk(lane) == matrix % 2, "B", lane);
    }
}

static void accumulators_cover_a_tile() {
    std::set<int> seen;
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) seen.insert(fragment_row(lane, i) * 8 + fragment_column(lane, i));
    expect(seen.size() == 128 && *seen.rbegin() == 127, "m16n8");
    for (int columns : {64, 128, 192, 256}) {
        std::set<int> group;
        for (int thread = 0; thread < 128; ++thread)
            for (int i = 0; i < columns / 2; ++i)
                group.insert(group_row(thread, i) * columns + group_column(thread, i));
        expect(group.size() == 64u * columns && *group.rbegin() == 64 * columns - 1, "m64", columns);
    }
}

// What ldmatrix gives to a lane: 4 bytes of row lane / 4 of each of the four matrices whose rows the lanes name.
static uint32_t loaded(const std::vector<uint8_t>& tile, const int (&address)[32], int lane, int matrix) {
    uint32_t word;
    memcpy(&word, tile.data() + address[matrix * 8 + lane / 4] + lane % 4 * 4, 4);
    return word;
}

static int8_t byte_of(uint32_t word, int i) { return static_cast<int8_t>(word >> (8 * i)); }

// One 16 x 16 x 32 step of bytes as a warp computes it, out of swizzled tiles, against plain loops.
static void a_warp_multiplies() {
    std::mt19937 random(5);
    std::vector<uint8_t> a(16 * kRowBytes), b(16 * kRowBytes);
    int8_t plain_a[16][kRowBytes], plain_b[16][kRowBytes];
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < kRowBytes; ++k) {
            const int at = chunk_offset(row, k / kChunkBytes) + k % kChunkBytes;
            a[at] = static_cast<uint8_t>(plain_a[row][k] = static_cast<int8_t>(random()));
            b[at] = static_cast<uint8_t>(plain_b[row][k] = static_cast<int8_t>(random()));
        }
    for (int step = 0; step < kSteps; ++step) {
        int a_address[32], b_address[32];
        for (int lane = 0; lane < 32; ++lane) {
            a_address[lane] = chunk_offset(a_lane_row(lane), 2 * step + a_lane_chunk(lane));
            b_address[lane] = chunk_offset(b_lane_row(lane), 2 * step + b_lane_chunk(lane));
        }
        for (int half = 0; half < 2; ++half) {  // two 8-column operands of one load
            // m16n8k32 (PTX ISA): lane holds A rows lane / 4 and + 8, B column lane / 4, bytes 4 (lane mod 4) .. + 3
            // and + 16.
            int full_a[16][32], full_b[8][32];
            for (int lane = 0; lane < 32; ++lane)
                for (int i = 0; i < 4; ++i) {
                    const int row = lane / 4, k = lane % 4 * 4 + i;
                    full_a[row][k] = byte_of(loaded(a, a_address, lane, 0), i);
                    full_a[row + 8][k] = byte_of(loaded(a, a_address, lane, 1), i);
                    full_a[row][k + 16] = byte_of(loaded(a, a_address, lane, 2), i);
                    full_a[row + 8][k + 16] = byte_of(loaded(a, a_address, lane, 3), i);
                    full_b[row][k] = byte_of(loaded(b, b_address, lane, 2 * half), i);
                    full_b[row][k + 16] = byte_of(loaded(b, b_address, lane, 2 * half + 1), i);
                }
            for (int lane = 0; lane < 32; ++lane)
                for (int i = 0; i < 4; ++i) {
                    const int m = fragment_row(lane, i), n = fragment_column(lane, i);
                    int got = 0, want = 0;
                    for (int k = 0; k < 32; ++k) {
                        got += full_a[m][k] * full_b[n][k];
                        want += plain_a[m][step * kStepBytes + k] * plain_b[half * 8 + n][step * kStepBytes + k];
                    }
                    expect(got == want, "product", lane, i);
                }
        }
    }
}

// Fields of a descriptor as the PTX ISA has them, for every address that a tile can start at.
static void descriptors_hold_their_fields() {
    for (uint32_t address = 0; address < 227 * 1024; address += kStepBytes) {
        const uint64_t d = tile_descriptor(address);
        expect((d & 0x3fff) == address / 16, "address", static_cast<int>(address));
        expect((d >> 32 & 0x3fff) == 8 * kRowBytes / 16 && d >> 62 == 1, "stride and swizzle");
    }
    for (int step = 0; step < kSteps; ++step) {
        expect(tile_descriptor(4096 + step * kStepBytes) == tile_descriptor(4096) + step * (kStepBytes / 16), "step",
               step);
    }
}

static void tiles_are_walked_once() {
    for (int rows : {1, 3, 4, 5, 24, 36})
        for (int columns : {1, 7, 64})
            for (int height : {1, 4, 8, 12}) {
                std::set<int> seen;
                for (int index = 0; index < rows * columns; ++index) {
                    const TileAt at = tile_at(index, rows, columns, height);
                    expect(at.row >= 0 && at.row < rows && at.column >= 0 && at.column < columns, "inside", rows,
                           columns);
                    expect(seen.insert(at.row * columns + at.column).second, "tile twice", rows, columns);
                }
            }
}

int main() {
    chunks_are_a_permutation();
    matrices_meet_no_bank_twice();
    lanes_name_matrices();
    accumulators_cover_a_tile();
    a_warp_multiplies();
    descriptors_hold_their_fields();
    tiles_are_walked_once();
    printf("ok\n");
    return 0;
}
