/* The linear maps of winograd.py, each in one pass over memory, for float32.

A tile is 25 points of all channels. Eight channels of one are taken into `d`, five rows of five, which the first cache
holds; a map goes over its columns, then over its rows, in place; and what has come of them is written. Every number is
written by one thread and its sums have one order, so results do not depend on how many threads there are.

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

/* The first `rows` rows of `d`, `columns` points each, from and to where points are `row` and `column` floats apart. */

MAP load(eight *d, const float *from, int rows, int columns, long row, long column)
{
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++)
            d[5 * r + c] = AT(from + r * row + c * column);
}

MAP store(const eight *d, float *to, int rows, int columns, long row, long column)
{
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++)
            AT(to + r * row + c * column) = d[5 * r + c];
}

/* A map over the first `columns` columns, then over the first `rows` rows. */
MAP over(eight *d, void (*map)(eight *, int), int columns, int rows)
{
    for (int c = 0; c < columns; c++)
        map(d + c, 5);
    for (int r = 0; r < rows; r++)
        map(d + 5 * r, 1);
}

/* `pixels` sees an image as (h / 4, w / 4) tiles, and in each the four pixels of every point one after another: these are
   every second pixel, of a row and of a column, from (y, x) on. The first or the last of five can lie outside. */

typedef struct { long y, x, height, width; } window;

static inline window window_of(long i, long j, int pixel, long h, long w)
{
    return (window){8 * i + pixel / 2 - 1, 8 * j + pixel % 2 - 1, 2 * h, 2 * w};
}

static inline int has(window at, int r, int c)
{
    long y = at.y + 2 * r, x = at.x + 2 * c;
    return y >= 0 && y < at.height && x >= 0 && x < at.width;
}

void pixels(const float *from, float *to, long n, long h, long w, long channels, long tile, long point)
{
    long row = 4 * w * channels, column = 2 * channels;
#pragma omp parallel for collapse(3)
    for (long image = 0; image < n; image++)
        for (long i = 0; i < h / 4; i++)
            for (long j = 0; j < w / 4; j++)
                for (int pixel = 0; pixel < 4; pixel++) {
                    window at = window_of(i, j, pixel, h, w);
                    const float *seen = from + ((image * at.height + at.y) * at.width + at.x) * channels;
                    float *made = to + ((image * (h / 4) + i) * (w / 4) + j) * tile + pixel * channels;
                    int whole = has(at, 0, 0) && has(at, 4, 4);
                    for (long k = 0; k < channels; k += 8) {
                        eight d[25];
                        if (whole)
                            load(d, seen + k, 5, 5, row, column);
                        else
                            for (int r = 0; r < 5; r++)
                                for (int c = 0; c < 5; c++)
                                    d[5 * r + c] = has(at, r, c) ? AT(seen + k + r * row + c * column) : (eight){0};
                        over(d, B_T, 5, 5);
                        store(d, made + k, 5, 5, 5 * point, point);
                    }
                }
}

void pixels_transposed(const float *from, float *to, long n, long h, long w, long channels, long tile, long point)
{
    long row = 4 * w * channels, column = 2 * channels, size = 4 * h * w * channels;
#pragma omp parallel for
    for (long image = 0; image < n; image++) { /* of one thread, because its tiles overlap */
        for (long k = 0; k < size; k += 8)
            AT(to + image * size + k) = (eight){0};
        for (long i = 0; i < h / 4; i++)
            for (long j = 0; j < w / 4; j++)
                for (int pixel = 0; pixel < 4; pixel++) {
                    window at = window_of(i, j, pixel, h, w);
                    const float *seen = from + ((image * (h / 4) + i) * (w / 4) + j) * tile + pixel * channels;
                    float *made = to + ((image * at.height + at.y) * at.width + at.x) * channels;
                    int whole = has(at, 0, 0) && has(at, 4, 4);
                    for (long k = 0; k < channels; k += 8) {
                        eight d[25];
                        load(d, seen + k, 5, 5, 5 * point, point);
                        over(d, B, 5, 5);
                        for (int r = 0; r < 5; r++)
                            for (int c = 0; c < 5; c++)
                                if (whole || has(at, r, c))
                                    AT(made + k + r * row + c * column) += d[5 * r + c];
                    }
                }
    }
}

void kernel(const float *from, float *to, long n, long h, long w, long channels, long tile, long point)
{
#pragma omp parallel for
    for (long i = 0; i < n; i++)
        for (int pixel = 0; pixel < 4; pixel++)
            for (long k = 0; k < channels; k += 8) {
                const float *seen = from + (16 * i + pixel / 2 * 4 + pixel % 2) * channels + k;
                eight d[25];
                load(d, seen, 2, 2, 8 * channels, 2 * channels);
                over(d, G, 2, 5);
                store(d, to + i * tile + pixel * channels + k, 5, 5, 5 * point, point);
            }
}

void kernel_transposed(const float *from, float *to, long n, long h, long w, long channels, long tile, long point)
{
#pragma omp parallel for
    for (long i = 0; i < n; i++)
        for (int pixel = 0; pixel < 4; pixel++)
            for (long k = 0; k < channels; k += 8) {
                float *made = to + (16 * i + pixel / 2 * 4 + pixel % 2) * channels + k;
                eight d[25];
                load(d, from + i * tile + pixel * channels + k, 5, 5, 5 * point, point);
                over(d, G_T, 5, 2);
                store(d, made, 2, 2, 8 * channels, 2 * channels);
            }
}

void grid(const float *from, float *to, long n, long h, long w, long channels, long tile, long point)
{
#pragma omp parallel for collapse(3)
    for (long image = 0; image < n; image++)
        for (long i = 0; i < h / 4; i++)
            for (long j = 0; j < w / 4; j++)
                for (long k = 0; k < channels; k += 8) {
                    eight d[25];
                    load(d, from + ((image * (h / 4) + i) * (w / 4) + j) * tile + k, 5, 5, 5 * point, point);
                    over(d, A_T, 5, 4);
                    store(d, to + ((image * h + 4 * i) * w + 4 * j) * channels + k, 4, 4, w * channels, channels);
                }
}

void grid_transposed(const float *from, float *to, long n, long h, long w, long channels, long tile, long point)
{
#pragma omp parallel for collapse(3)
    for (long image = 0; image < n; image++)
        for (long i = 0; i < h / 4; i++)
            for (long j = 0; j < w / 4; j++)
                for (long k = 0; k < channels; k += 8) {
                    eight d[25];
                    load(d, from + ((image * h + 4 * i) * w + 4 * j) * channels + k, 4, 4, w * channels, channels);
                    over(d, A, 4, 5);
                    store(d, to + ((image * (h / 4) + i) * (w / 4) + j) * tile + k, 5, 5, 5 * point, point);
                }
}
