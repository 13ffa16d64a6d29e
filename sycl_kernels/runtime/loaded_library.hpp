// Functions of a shared library that the process has already loaded.
#pragma once

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace moe_xe {

class LoadedLibrary {
public:
    // Throws std::runtime_error where the process has not loaded it.
    explicit LoadedLibrary(const char* name) : name_(name) {
        handle_ = dlopen(name, RTLD_NOW | RTLD_NOLOAD);
        if (!handle_) throw std::runtime_error(name_ + " is not loaded");
    }

    // `Function` is a function's type, `version` that of the symbol where it matters.
    // Throws std::runtime_error for an unknown name.
    template <typename Function>
    Function* get(const char* function, const char* version = nullptr) const {
        void* const address = version ? dlvsym(handle_, function, version) : dlsym(handle_, function);
        if (!address)
            throw std::runtime_error(name_ + " has no " + function + (version ? std::string(" of version ") + version : ""));
        return reinterpret_cast<Function*>(address);
    }

private:
    std::string name_;
    void* handle_;  // never closed: the library serves until the process ends
};

}  // namespace moe_xe
