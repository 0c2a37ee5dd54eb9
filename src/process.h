/*
 * process.h
 *		First and last steps of the processes that the launcher starts in a
 *		database.
 */
#ifndef SM_PROCESS_H
#define SM_PROCESS_H

#include "compat.h"
#include "shmem.h"

#define SM_EXTENSION_NAME "softmobile"

/* Worker: attach and connect; returns the extension's OID or does not return. */
extern Oid	sm_process_join(Datum main_arg);

/* The extension's OID and owner; InvalidOid when this database has none. */
extern Oid	sm_process_lookup_extension(Oid *owner);

/* Worker: have settings of the database or the role changed since it connected? */
extern bool sm_process_settings_changed(void);

/*
 * Worker, first in each transaction: true, and the extension cannot be dropped or
 * replaced before the transaction ends; false, and the process should leave.
 */
extern bool sm_process_extension_stands(Oid extension);

/* End the process in good order, and tell the launcher why. */
pg_noreturn extern void sm_process_leave(SmVerdict verdict);

pg_noreturn extern PGDLLEXPORT void softmobile_probe_main(Datum main_arg);

#endif							/* SM_PROCESS_H */
