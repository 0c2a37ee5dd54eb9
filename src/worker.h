/*
 * worker.h
 *		The sync worker of a database.
 */
#ifndef SM_WORKER_H
#define SM_WORKER_H

#include "compat.h"

pg_noreturn extern PGDLLEXPORT void softmobile_worker_main(Datum main_arg);

#endif							/* SM_WORKER_H */
