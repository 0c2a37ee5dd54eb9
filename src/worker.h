/*
 * worker.h
 *		The sync worker of a database.
 */
#ifndef SM_WORKER_H
#define SM_WORKER_H

extern PGDLLEXPORT void softmobile_worker_main(Datum main_arg) pg_attribute_noreturn();

#endif							/* SM_WORKER_H */
