// One launch of a wce_row or wce_stream kernel against a double loop, as a program of its own: sanitizers cannot be
// loaded into Python, and a broken kernel may end the process.
//
//   run_checks KERNEL BLOCK VOCABULARY STRIDE OFFSET PLACE ORDER
//
// OFFSET: elements between a 16-byte border and the first logit. PLACE: in (gradient over the logits), out, none.
// ORDER: 0 ascending, 1 descending, 2 random. Exit code 0 and "ok HASH" (of all result bits); 1 and a line "shim: ..."
// or "value: ..." for a fault that the shim or the comparison found. Buffers have the exact size; under
// -fsanitize=address what lies between two rows is poisoned, and out of place so are the logits of the row of weight 0.
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "element_host.h"
#include "simt_api.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(start, bytes) ((void)(start), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(start, bytes) ((void)(start), (void)(bytes))
#endif

constexpr int ROWS = 5;
constexpr float WEIGHTS[ROWS] = {1.5f, 0.f, -0.75f, 0.125f, 2.f};
constexpr float UPSTREAM = 0.5f;

struct Element {  // the dtype in the kernel's name
    size_t bytes;
    float (*load)(const char*);
    void (*store)(char*, float);
    double relative_step;  // distance of two neighbours, relative, at most
    double smallest_step;
};

template <float (*unpack)(unsigned short)>
float load_16(const char* address) {
    unsigned short bits;
    memcpy(&bits, address, 2);
    return unpack(bits);
}

template <unsigned (*round)(float)>
void store_16(char* address, float value) {
    const unsigned short bits = static_cast<unsigned short>(round(value));
    memcpy(address, &bits, 2);
}

float unpack_bf16(unsigned short bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }

float load_fp32(const char* address) {
    float value;
    memcpy(&value, address, 4);
    return value;
}

Element element_of(const std::string& kernel) {
    if (kernel.find("bf16") != std::string::npos)
        return {2, load_16<unpack_bf16>, store_16<bf16_bits>, std::ldexp(1, -7), 0};
    if (kernel.find("fp16") != std::string::npos)
        return {2, load_16<unpack_fp16>, store_16<fp16_bits>, std::ldexp(1, -10), std::ldexp(1, -24)};
    return {4, load_fp32, [](char* address, float value) { memcpy(address, &value, 4); }, std::ldexp(1, -23), 0};
}

struct Case {
    std::string kernel, place;
    Element element;
    int block, order, vocabulary;
    long long stride, offset;
    char* logits = nullptr;
    char* gradient = nullptr;
    std::vector<std::vector<double>> values;  // (rows, V): the logits as rounded to the dtype
    long long targets[ROWS];
    float losses[ROWS], logsumexps[ROWS];
    int bad_row = 0;

    long long bytes() const { return ((ROWS - 1) * stride + vocabulary) * static_cast<long long>(element.bytes); }
    long long position(int row, long long column) const { return (row * stride + column) * element.bytes; }
};

char* exact_buffer(const Case& test) {
    if (test.bytes() > 1ll << 30) {  // only touched pages exist
        void* start = mmap(nullptr, test.bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                           -1, 0);
        if (start == MAP_FAILED) perror("mmap"), exit(2);
        return static_cast<char*>(start);
    }
    const long long offset_bytes = test.offset * test.element.bytes;
    void* start = nullptr;
    if (posix_memalign(&start, 16, offset_bytes + test.bytes())) exit(2);
    return static_cast<char*>(start) + offset_bytes;
}

void fill(Case& test) {
    unsigned long long state = 1;
    const auto uniform = [&state] {  // in [-1, 1)
        state = state * 6364136223846793005u + 1442695040888963407u;
        return static_cast<double>(state >> 33) / (1u << 30) - 1;
    };
    const int V = test.vocabulary;
    const long long targets[ROWS] = {0, 1ll << 40, V - 1, V / 2, V / 3};  // nobody looks at the target of weight 0
    memcpy(test.targets, targets, sizeof targets);
    test.logits = exact_buffer(test);
    test.gradient = test.place == "in" ? test.logits : test.place == "out" ? exact_buffer(test) : nullptr;
    test.values.assign(ROWS, std::vector<double>(V));
    for (int row = 0; row < ROWS; ++row)
        for (int column = 0; column < V; ++column) {
            char* address = test.logits + test.position(row, column);
            const double logit = 6 * uniform() + (column == test.targets[row] ? 2 : 0);
            test.element.store(address, WEIGHTS[row] == 0 ? NAN : logit);
            test.values[row][column] = test.element.load(address);
        }
    for (int row = 0; row + 1 < ROWS && test.bytes() < 1ll << 30; ++row)
        for (char* buffer : {test.logits, test.gradient})
            if (buffer)
                ASAN_POISON_MEMORY_REGION(buffer + test.position(row, V), (test.stride - V) * test.element.bytes);
    if (test.place != "in") ASAN_POISON_MEMORY_REGION(test.logits + test.position(1, 0), V * test.element.bytes);
}

void run(Case& test) {
    float upstream = UPSTREAM;
    const float *weights = WEIGHTS, *upstream_pointer = &upstream;
    const long long* targets = test.targets;
    float *losses = test.losses, *logsumexps = test.logsumexps;
    int* bad_row = &test.bad_row;
    void* parameters[] = {&test.logits, &test.stride,      &test.gradient, &test.stride, &test.vocabulary, &targets,
                          &weights,     &upstream_pointer, &losses,        &logsumexps,  &bad_row};
    if (simt_launch(test.kernel.c_str(), ROWS, test.block, parameters, test.order, 1)) {
        printf("shim: %s\n", simt_error());
        exit(1);
    }
}

void expect(const char* what, int row, int column, double found, double expected, double tolerance) {
    if (std::fabs(found - expected) <= tolerance) return;  // NaN is not
    printf("value: %s of row %d, column %d is %.9g, expected %.9g\n", what, row, column, found, expected);
    exit(1);
}

void compare(const Case& test) {
    const int V = test.vocabulary;
    for (int row = 0; row < ROWS; ++row) {
        const double weight = WEIGHTS[row];
        double maximum = -INFINITY, sum = 0;
        for (double value : test.values[row]) maximum = std::fmax(maximum, value);
        for (double value : test.values[row]) sum += std::exp(value - maximum);
        const double logsumexp = weight == 0 ? 0 : maximum + std::log(sum);
        const double loss = weight == 0 ? 0 : weight * (logsumexp - test.values[row][test.targets[row]]);
        expect("loss", row, -1, test.losses[row], loss, 1e-5 * std::fabs(loss) + 1e-6 * std::fabs(weight));
        expect("logsumexp", row, -1, test.logsumexps[row], logsumexp, 1e-6 * (std::fabs(logsumexp) + 1));
        if (!test.gradient) continue;
        for (int column = 0; column < V; ++column) {
            const double probability = weight == 0 ? 0 : std::exp(test.values[row][column] - logsumexp);
            const double expected = weight * UPSTREAM * (probability - (column == test.targets[row]));
            const double step = std::fmax(test.element.relative_step * std::fabs(expected), test.element.smallest_step);
            expect("gradient", row, column, test.element.load(test.gradient + test.position(row, column)), expected,
                   std::fmax(step, 1e-6 * std::fabs(weight)));
        }
    }
    expect("bad_row", -1, -1, test.bad_row, 0, 0);
}

unsigned long long hash_of_results(const Case& test) {  // FNV-1a
    unsigned long long hash = 0xcbf29ce484222325u;
    const auto add = [&hash](const void* start, size_t bytes) {
        for (size_t i = 0; i < bytes; ++i) hash = (hash ^ static_cast<const unsigned char*>(start)[i]) * 0x100000001b3u;
    };
    add(test.losses, sizeof test.losses);
    add(test.logsumexps, sizeof test.logsumexps);
    for (int row = 0; row < ROWS && test.gradient; ++row)
        add(test.gradient + test.position(row, 0), test.vocabulary * test.element.bytes);
    return hash;
}

int main(int argc, char** argv) {
    if (argc != 8) return fprintf(stderr, "found %d arguments, expected 7\n", argc - 1), 2;
    Case test;
    test.kernel = argv[1];
    test.block = atoi(argv[2]);
    test.vocabulary = atoi(argv[3]);
    test.stride = atoll(argv[4]);
    test.offset = atoll(argv[5]);
    test.place = argv[6];
    test.order = atoi(argv[7]);
    test.element = element_of(test.kernel);
    fill(test);
    run(test);
    compare(test);
    printf("ok %016llx\n", hash_of_results(test));
    return 0;
}
