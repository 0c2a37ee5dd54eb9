/*
 * launcher.h
 *		The launcher: one worker for each database that has the extension.
 */
#ifndef SM_LAUNCHER_H
#define SM_LAUNCHER_H

#include "compat.h"

extern void sm_launcher_init(void);

pg_noreturn extern PGDLLEXPORT void softmobile_launcher_main(Datum main_arg);

#endif							/* SM_LAUNCHER_H */
