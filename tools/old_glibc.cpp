// What the kernel gets from this machine's glibc and libstdc++, but is not in those of 2018 (glibc 2.28, GCC 8), the
// oldest that PyTorch runs on. `make wheels` links this file, so that one build runs on all since then.
#include <new>
#include <sstream>

#pragma GCC visibility push(hidden)
extern "C" {

// Functions that have a newer version by the same name: call the first one.
asm(".symver first_exp, exp@GLIBC_2.2.5");
asm(".symver first_dlsym, dlsym@GLIBC_2.2.5");
__attribute__((visibility("default"))) double first_exp(double);
__attribute__((visibility("default"))) void* first_dlsym(void*, const char*);
double call_exp(double) asm("exp");
void* call_dlsym(void*, const char*) asm("dlsym");
double call_exp(double x) { return first_exp(x); }
void* call_dlsym(void* library, const char* name) { return first_dlsym(library, name); }

// glibc 2.32: reference counts may do without atomic instructions while this is not zero.
extern char __libc_single_threaded;
char __libc_single_threaded = 0;
}
#pragma GCC visibility pop

// GCC 9 and 11. The linker would also find these in libtorch_cpu.so, but they are not part of PyTorch's stable ABI.
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();
void std::__throw_bad_array_new_length() { throw bad_array_new_length(); }
