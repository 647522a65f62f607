// A libcuda.so.1 without a GPU: what train/cuda/runtime.py needs of the CUDA driver, kernels run by simt_shim.h on the
// CPU. Compiled after the kernels' text (tests/train/test_cuda_launch.py writes the file that includes all), so that
// the number and sizes of a kernel's parameters come from its own signature: a launch packed otherwise is noticed.
//
// It is strict where a real driver would crash or keep silent: every call needs the context that was pushed, streams
// and images must be known ones. Environment:
//   FAKE_DRIVER_CAPABILITY  compute capability of the device, "9.0" without it
//   FAKE_DRIVER_FAIL        "name:code[:n]": the n-th call of that function (without n: every call) returns the code
//   FAKE_DRIVER_LACKS       names of functions that this driver is too old to have, with commas
//   FAKE_DRIVER_LOG         file that gets one line per launch: kernel, grid, block, stream
#include <map>
#include <string>

namespace fake {

constexpr int SUCCESS = 0, INVALID_VALUE = 1, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
              INVALID_CONTEXT = 201, NOT_FOUND = 500, LAUNCH_FAILED = 719;
constexpr int MAJOR_ATTRIBUTE = 75, MINOR_ATTRIBUTE = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*

struct Parameter {
    size_t offset, size;
};

struct Function {
    std::string name;
    std::vector<Parameter> parameters;
};

inline std::map<std::string, Function>& functions() {
    static std::map<std::string, Function> table;
    return table;
}

template <class... Types>
Function describe(const char* name, void (*)(Types...)) {
    Function function{name, {}};
    size_t offset = 0;
    for (size_t size : {sizeof(Types)...}) {  // all parameters are plain numbers, aligned to their size
        offset = (offset + size - 1) / size * size;
        function.parameters.push_back({offset, size});
        offset += size;
    }
    return function;
}

struct Registration {
    explicit Registration(const Function& function) { functions()[function.name] = function; }
};

#define FAKE_KERNEL(name) static const fake::Registration described_##name(fake::describe(#name, name));

struct Driver {
    bool initialized = false;
    int retained = 0;
    std::vector<void*> contexts;  // the stack of the one thread that tests have
    std::map<std::string, int> calls;
};

inline Driver driver;
inline char context, module;  // only their addresses are used

inline std::string setting(const char* name) {
    const char* value = getenv(name);
    return value ? value : "";
}

// The code that FAKE_DRIVER_FAIL orders for this call, else 0.
inline int ordered_failure(const std::string& name) {
    const int number = ++driver.calls[name];
    const std::string order = setting("FAKE_DRIVER_FAIL");
    const size_t colon = order.find(':');
    if (colon == std::string::npos || order.substr(0, colon) != name) return SUCCESS;
    const size_t second = order.find(':', colon + 1);
    if (second != std::string::npos && std::stoi(order.substr(second + 1)) != number) return SUCCESS;
    return std::stoi(order.substr(colon + 1));
}

inline bool has_context() { return !driver.contexts.empty() && driver.contexts.back() == &context; }

}  // namespace fake

#define CALL(name) \
    if (const int failure = fake::ordered_failure(name)) return failure

extern "C" {

int cuInit(unsigned flags) {
    CALL("cuInit");
    fake::driver.initialized = flags == 0;
    return flags ? fake::INVALID_VALUE : fake::SUCCESS;
}

int cuDriverGetVersion(int* version) {
    *version = 13000;
    return fake::SUCCESS;
}

int cuGetErrorString(int code, const char** text) {
    *text = code == fake::LAUNCH_FAILED ? simt_error() : "a failure of the fake driver";
    return fake::SUCCESS;
}

int cuDeviceGet(int* device, int ordinal) {
    CALL("cuDeviceGet");
    if (!fake::driver.initialized) return fake::NOT_INITIALIZED;
    *device = ordinal;
    return ordinal == 0 ? fake::SUCCESS : fake::INVALID_DEVICE;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
    CALL("cuDeviceGetAttribute");
    std::string capability = fake::setting("FAKE_DRIVER_CAPABILITY");
    if (capability.empty()) capability = "9.0";
    const size_t point = capability.find('.');
    if (attribute == fake::MAJOR_ATTRIBUTE) *value = std::stoi(capability.substr(0, point));
    else if (attribute == fake::MINOR_ATTRIBUTE) *value = std::stoi(capability.substr(point + 1));
    else return fake::INVALID_VALUE;
    return device == 0 ? fake::SUCCESS : fake::INVALID_DEVICE;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
    CALL("cuDevicePrimaryCtxRetain");
    ++fake::driver.retained;
    *context = &fake::context;
    return device == 0 ? fake::SUCCESS : fake::INVALID_DEVICE;
}

int cuCtxPushCurrent_v2(void* context) {
    CALL("cuCtxPushCurrent");
    // one left behind by an earlier call would make torch's next one run on the wrong device
    if (context != &fake::context || !fake::driver.contexts.empty()) return fake::INVALID_CONTEXT;
    fake::driver.contexts.push_back(context);
    return fake::SUCCESS;
}

int cuCtxPopCurrent_v2(void** context) {
    CALL("cuCtxPopCurrent");
    if (fake::driver.contexts.empty()) return fake::INVALID_CONTEXT;
    *context = fake::driver.contexts.back();
    fake::driver.contexts.pop_back();
    return fake::SUCCESS;
}

int cuModuleLoadData(void** module, const void* image) {
    CALL("cuModuleLoadData");
    if (!fake::has_context()) return fake::INVALID_CONTEXT;
    const bool is_cubin = !memcmp(image, "\177ELF", 4);
    const bool is_ptx = strstr(static_cast<const char*>(image), ".target") != nullptr;  // PTX text ends with a zero
    *module = &fake::module;
    return is_cubin || is_ptx ? fake::SUCCESS : fake::INVALID_IMAGE;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
    CALL("cuModuleGetFunction");
    if (!fake::has_context()) return fake::INVALID_CONTEXT;
    if (module != &fake::module) return fake::INVALID_VALUE;
    const auto found = fake::functions().find(name);
    if (found == fake::functions().end() || !simt_has_kernel(name)) return fake::NOT_FOUND;
    *function = &found->second;
    return fake::SUCCESS;
}

int cuFuncGetParamInfo(void* function, size_t number, size_t* offset, size_t* size) {
    CALL("cuFuncGetParamInfo");
    const auto& parameters = static_cast<fake::Function*>(function)->parameters;
    if (number >= parameters.size()) return fake::INVALID_VALUE;
    *offset = parameters[number].offset;
    if (size) *size = parameters[number].size;
    return fake::SUCCESS;
}

int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** parameters,
                   void** extra) {
    CALL("cuLaunchKernel");
    if (!fake::has_context()) return fake::INVALID_CONTEXT;
    if (grid_x == 0 || grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1 || shared_bytes || extra)
        return fake::INVALID_VALUE;
    const std::string name = static_cast<fake::Function*>(function)->name;
    const std::string log = fake::setting("FAKE_DRIVER_LOG");
    if (!log.empty())
        if (FILE* file = fopen(log.c_str(), "a")) {
            fprintf(file, "%s %u %u %zu\n", name.c_str(), grid_x, block_x, reinterpret_cast<size_t>(stream));
            fclose(file);
        }
    return simt_launch(name.c_str(), grid_x, block_x, parameters, SIMT_DESCENDING, 0) ? fake::LAUNCH_FAILED
                                                                                       : fake::SUCCESS;
}

// NVRTC 13 looks for hooks of profilers in the driver, and crashes where it finds a driver without this function.
int cuGetExportTable(const void** table, const void*) {
    static const size_t no_functions[6] = {sizeof(size_t)};  // a table begins with its own size
    *table = no_functions;
    return fake::SUCCESS;
}

// cuda-bindings asks for every function through this one; what is not here is missing for it.
int cuGetProcAddress_v2(const char* symbol, void** address, int, uint64_t, int* status) {
    static const std::map<std::string, void*> table = {
        {"cuInit", reinterpret_cast<void*>(cuInit)},
        {"cuDriverGetVersion", reinterpret_cast<void*>(cuDriverGetVersion)},
        {"cuGetErrorString", reinterpret_cast<void*>(cuGetErrorString)},
        {"cuDeviceGet", reinterpret_cast<void*>(cuDeviceGet)},
        {"cuDeviceGetAttribute", reinterpret_cast<void*>(cuDeviceGetAttribute)},
        {"cuDevicePrimaryCtxRetain", reinterpret_cast<void*>(cuDevicePrimaryCtxRetain)},
        {"cuCtxPushCurrent", reinterpret_cast<void*>(cuCtxPushCurrent_v2)},
        {"cuCtxPopCurrent", reinterpret_cast<void*>(cuCtxPopCurrent_v2)},
        {"cuModuleLoadData", reinterpret_cast<void*>(cuModuleLoadData)},
        {"cuModuleGetFunction", reinterpret_cast<void*>(cuModuleGetFunction)},
        {"cuFuncGetParamInfo", reinterpret_cast<void*>(cuFuncGetParamInfo)},
        {"cuLaunchKernel", reinterpret_cast<void*>(cuLaunchKernel)},
        {"cuGetProcAddress", reinterpret_cast<void*>(cuGetProcAddress_v2)},
    };
    const auto found = table.find(symbol);
    const bool lacks = ("," + fake::setting("FAKE_DRIVER_LACKS") + ",").find("," + std::string(symbol) + ",") !=
                       std::string::npos;
    const bool missing = found == table.end() || lacks;
    *address = missing ? nullptr : found->second;
    if (status) *status = missing ? 1 : 0;
    return missing ? fake::NOT_FOUND : fake::SUCCESS;
}
}
