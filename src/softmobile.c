/*
 * softmobile.c
 *		The module's magic block and its initialization.
 *
 * The library can be loaded by the postmaster (shared_preload_libraries), which
 * gives it shared memory, the launcher and all hooks, or by a backend that calls
 * one of its functions: capture works then, and nothing is sent.
 */
#include "postgres.h"

#include "fmgr.h"

#include "capture.h"
#include "guard.h"
#include "guc.h"
#include "hooks.h"
#include "launcher.h"
#include "shmem.h"

PG_MODULE_MAGIC;

extern PGDLLEXPORT void _PG_init(void);

void
_PG_init(void)
{
	sm_guc_init();
	sm_shmem_init();
	sm_launcher_init();
	sm_hooks_init();
	sm_guard_init();
	sm_capture_init();
}
