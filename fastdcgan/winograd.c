/* The linear maps of winograd.py, each in one pass over memory, for float32.

A tile is 25 points of all channels. Eight channels of one are taken into `d`, five rows of five, which the first cache
holds; a map goes over its columns, then over its rows, in place; and what has come of them is written. Every number is
written by one thread and its sums have one order, so results do not depend on how many threads there are. Tiles are
counted by m: along a row of an image, then down the image, then from image to image.

Every function takes where to read and where to write; how many images (for the kernel's, output channels), the smaller
grid's height and width, and channels, a multiple of eight, as in `transform`; and for the tiles, (M, 25, channels), how
many floats lie from one to the next and from one of its points to the next. Everything else is contiguous. */

typedef float eight __attribute__((vector_size(32), aligned(4)));

#define AT(pointer) (*(eight *)(pointer))
#define MAP static inline __attribute__((always_inline)) void

/* In one dimension; the points are a step apart. */

MAP B_T(eight *d, int step)
{
    eight x0 = d[0], x1 = d[step], x2 = d[2 * step], x3 = d[3 * step], x4 = d[4 * step];
    d[0] = x0 - x2 - 0.5f * (x1 - x3);
    d[step] = x1 + 0.5f * (x2 - x3);
    d[2 * step] = 0.5f * x2 - (1 / 3.f) * x1 - (1 / 6.f) * x3;
    d[3 * step] = (1 / 6.f) * (x3 - x1);
    d[4 * step] = x4 - x2 + 2 * (x1 - x3);
}

MAP B(eight *d, int step)
{
    eight x0 = d[0], x1 = d[step], x2 = d[2 * step], x3 = d[3 * step], x4 = d[4 * step];
    d[step] = x1 - 0.5f * x0 - (1 / 3.f) * x2 - (1 / 6.f) * x3 + 2 * x4;
    d[2 * step] = 0.5f * (x1 + x2) - x0 - x4;
    d[3 * step] = 0.5f * (x0 - x1) + (1 / 6.f) * (x3 - x2) - 2 * x4;
}

MAP G(eight *d, int step)
{
    eight x0 = d[0], x1 = d[step];
    d[step] = x0 + x1;
    d[2 * step] = x0 - x1;
    d[3 * step] = x0 + 2 * x1;
    d[4 * step] = x1;
}

MAP G_T(eight *d, int step)
{
    eight x0 = d[0], x1 = d[step], x2 = d[2 * step], x3 = d[3 * step], x4 = d[4 * step];
    d[0] = x0 + x1 + x2 + x3;
    d[step] = x1 - x2 + 2 * x3 + x4;
}

MAP A_T(eight *d, int step)
{
    eight x0 = d[0], x1 = d[step], x2 = d[2 * step], x3 = d[3 * step], x4 = d[4 * step];
    d[0] = x0 + x1 + x2 + x3;
    d[step] = x1 - x2 + 2 * x3;
    d[2 * step] = x1 + x2 + 4 * x3;
    d[3 * step] = x1 - x2 + 8 * x3 + x4;
}

MAP A(eight *d, int step)
{
    eight x0 = d[0], x1 = d[step], x2 = d[2 * step], x3 = d[3 * step];
    d[step] = x0 + x1 + x2 + x3;
    d[2 * step] = x0 - x1 + x2 - x3;
    d[3 * step] = x0 + 2 * x1 + 4 * x2 + 8 * x3;
    d[4 * step] = x3;
}

/* A square of points, `side` each way, and how many floats apart those of two rows, and of two columns, are. Made where
   it is used, inside the parallel loops: from outside, `side` would be no constant there, and no loop unrolled. */
typedef struct { int side; long row, column; } square;

/* A map over the columns of `d`, `from` of them, then over as many rows as come of that, `to`. */
MAP over(eight *d, void (*map)(eight *, int), int from, int to)
{
    for (int c = 0; c < from; c++)
        map(d + c, 5);
    for (int r = 0; r < to; r++)
        map(d + 5 * r, 1);
}

MAP load(eight *d, const float *from, square at)
{
    for (int r = 0; r < at.side; r++)
        for (int c = 0; c < at.side; c++)
            d[5 * r + c] = AT(from + r * at.row + c * at.column);
}

MAP store(const eight *d, float *to, square at)
{
    for (int r = 0; r < at.side; r++)
        for (int c = 0; c < at.side; c++)
            AT(to + r * at.row + c * at.column) = d[5 * r + c];
}

/* A map of one square of points, all channels. */
MAP apply(void (*map)(eight *, int), const float *from, square seen, float *to, square made, long channels)
{
    for (long k = 0; k < channels; k += 8) {
        eight d[25];
        load(d, from + k, seen);
        over(d, map, seen.side, made.side);
        store(d, to + k, made);
    }
}

/* Tile m sees the images through four windows, one for each `pixel` of its points: every second pixel, of a row and of a
   column, from (y, x) of its image on. The first or the last of five can lie outside. `first` is the number of pixels
   before the window's, over all images. */
typedef struct { long y, x, height, width, first; } window;

static inline window window_of(long m, int pixel, long h, long w)
{
    long line = m / (w / 4), x = 8 * (m % (w / 4)) + pixel % 2 - 1, y = pixel / 2 - 1;
    return (window){8 * (line % (h / 4)) + y, x, 2 * h, 2 * w, (8 * line + y) * 2 * w + x};
}

static inline int has(window at, int r, int c)
{
    long y = at.y + 2 * r, x = at.x + 2 * c;
    return y >= 0 && y < at.height && x >= 0 && x < at.width;
}

static inline int is_whole(window at)
{
    return has(at, 0, 0) && has(at, 4, 4);
}

void pixels(const float *from, float *to, long n, long h, long w, long channels, long tile, long point)
{
#pragma omp parallel for
    for (long m = 0; m < n * (h / 4) * (w / 4); m++)
        for (int pixel = 0; pixel < 4; pixel++) {
            square seen = {5, 4 * w * channels, 2 * channels}, made = {5, 5 * point, point};
            window at = window_of(m, pixel, h, w);
            const float *first = from + at.first * channels;
            int whole = is_whole(at);
            for (long k = 0; k < channels; k += 8) {
                eight d[25];
                if (whole)
                    load(d, first + k, seen);
                else
                    for (int r = 0; r < 5; r++)
                        for (int c = 0; c < 5; c++)
                            d[5 * r + c] = has(at, r, c) ? AT(first + k + r * seen.row + c * seen.column) : (eight){0};
                over(d, B_T, 5, 5);
                store(d, to + m * tile + pixel * channels + k, made);
            }
        }
}

void pixels_transposed(const float *from, float *to, long n, long h, long w, long channels, long tile, long point)
{
    long size = 4 * h * w * channels, tiles = (h / 4) * (w / 4);
#pragma omp parallel for
    for (long image = 0; image < n; image++) { /* of one thread, because its tiles overlap */
        for (long k = 0; k < size; k += 8)
            AT(to + image * size + k) = (eight){0};
        for (long m = image * tiles; m < (image + 1) * tiles; m++)
            for (int pixel = 0; pixel < 4; pixel++) {
                square seen = {5, 5 * point, point}, made = {5, 4 * w * channels, 2 * channels};
                window at = window_of(m, pixel, h, w);
                float *first = to + at.first * channels;
                int whole = is_whole(at);
                for (long k = 0; k < channels; k += 8) {
                    eight d[25];
                    load(d, from + m * tile + pixel * channels + k, seen);
                    over(d, B, 5, 5);
                    for (int r = 0; r < 5; r++)
                        for (int c = 0; c < 5; c++)
                            if (whole || has(at, r, c))
                                AT(first + k + r * made.row + c * made.column) += d[5 * r + c];
                }
            }
    }
}

/* The kernel's taps for one of the four pixels: every second of four by four. */
static inline long tap(long m, int pixel)
{
    return 16 * m + pixel / 2 * 4 + pixel % 2;
}

void kernel(const float *from, float *to, long n, long h, long w, long channels, long tile, long point)
{
#pragma omp parallel for
    for (long m = 0; m < n; m++)
        for (int pixel = 0; pixel < 4; pixel++) {
            square taps = {2, 8 * channels, 2 * channels}, points = {5, 5 * point, point};
            apply(G, from + tap(m, pixel) * channels, taps, to + m * tile + pixel * channels, points, channels);
        }
}

void kernel_transposed(const float *from, float *to, long n, long h, long w, long channels, long tile, long point)
{
#pragma omp parallel for
    for (long m = 0; m < n; m++)
        for (int pixel = 0; pixel < 4; pixel++) {
            square taps = {2, 8 * channels, 2 * channels}, points = {5, 5 * point, point};
            apply(G_T, from + m * tile + pixel * channels, points, to + tap(m, pixel) * channels, taps, channels);
        }
}

/* The first of tile m's four by four cells of the smaller grid, over all images. */
static inline long cell(long m, long w)
{
    return m / (w / 4) * 4 * w + m % (w / 4) * 4;
}

void grid(const float *from, float *to, long n, long h, long w, long channels, long tile, long point)
{
#pragma omp parallel for
    for (long m = 0; m < n * (h / 4) * (w / 4); m++) {
        square cells = {4, w * channels, channels}, points = {5, 5 * point, point};
        apply(A_T, from + m * tile, points, to + cell(m, w) * channels, cells, channels);
    }
}

void grid_transposed(const float *from, float *to, long n, long h, long w, long channels, long tile, long point)
{
#pragma omp parallel for
    for (long m = 0; m < n * (h / 4) * (w / 4); m++) {
        square cells = {4, w * channels, channels}, points = {5, 5 * point, point};
        apply(A, from + cell(m, w) * channels, cells, to + m * tile, points, channels);
    }
}
