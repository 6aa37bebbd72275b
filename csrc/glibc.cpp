// Lets the extension load with glibc 2.28, whatever newer one it is linked with: the wheel's tag, manylinux_2_28, is torch's own.
//
// glibc 2.34 moved pthreads, dl and rt into libc.so under a new symbol version, which the linker binds what refers to them to. The old
// versions are still there and mean the same. So did glibc 2.29 with functions of libm, which no longer call a handler of errors. What
// refers to the names below (the static CUDA runtime; log: module.cpp) finds the definitions here, which are local to the extension and
// jump to the old version.

#include <cstdlib>  // defines __GLIBC__

#if defined(__x86_64__) && defined(__GLIBC__)

#define OLD(name, version)                                  \
  asm(".text\n.globl " #name "\n.hidden " #name "\n"        \
      ".type " #name ", @function\n" #name ":\n"            \
      "  jmp *old." #name "@GOTPCREL(%rip)\n"               \
      ".size " #name ", . - " #name "\n"                    \
      ".symver old." #name ", " #name "@GLIBC_" version);

OLD(dlclose, "2.2.5")
OLD(dlerror, "2.2.5")
OLD(dlmopen, "2.3.4")
OLD(dlopen, "2.2.5")
OLD(dlsym, "2.2.5")
OLD(dlvsym, "2.2.5")
OLD(log, "2.2.5")
OLD(pthread_condattr_setpshared, "2.2.5")
OLD(pthread_create, "2.2.5")
OLD(pthread_detach, "2.2.5")
OLD(pthread_getspecific, "2.2.5")
OLD(pthread_join, "2.2.5")
OLD(pthread_key_create, "2.2.5")
OLD(pthread_key_delete, "2.2.5")
OLD(pthread_kill, "2.2.5")
OLD(pthread_mutex_trylock, "2.2.5")
OLD(pthread_mutexattr_destroy, "2.2.5")
OLD(pthread_mutexattr_init, "2.2.5")
OLD(pthread_mutexattr_setpshared, "2.2.5")
OLD(pthread_mutexattr_settype, "2.2.5")
OLD(pthread_once, "2.2.5")
OLD(pthread_rwlock_destroy, "2.2.5")
OLD(pthread_rwlock_init, "2.2.5")
OLD(pthread_rwlock_rdlock, "2.2.5")
OLD(pthread_rwlock_timedrdlock, "2.2.5")
OLD(pthread_rwlock_timedwrlock, "2.2.5")
OLD(pthread_rwlock_tryrdlock, "2.2.5")
OLD(pthread_rwlock_trywrlock, "2.2.5")
OLD(pthread_rwlock_unlock, "2.2.5")
OLD(pthread_rwlock_wrlock, "2.2.5")
OLD(pthread_rwlockattr_destroy, "2.2.5")
OLD(pthread_rwlockattr_init, "2.2.5")
OLD(pthread_rwlockattr_setpshared, "2.2.5")
OLD(pthread_setspecific, "2.2.5")
OLD(pthread_spin_destroy, "2.2.5")
OLD(pthread_spin_init, "2.2.5")
OLD(pthread_spin_lock, "2.2.5")
OLD(pthread_spin_trylock, "2.2.5")
OLD(pthread_spin_unlock, "2.2.5")
OLD(sem_destroy, "2.2.5")
OLD(sem_init, "2.2.5")
OLD(sem_post, "2.2.5")
OLD(sem_timedwait, "2.2.5")
OLD(sem_trywait, "2.2.5")
OLD(sem_wait, "2.2.5")
OLD(shm_open, "2.2.5")
OLD(shm_unlink, "2.2.5")

// Of glibc 2.32, read by std::shared_ptr: false is always right.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

#endif
