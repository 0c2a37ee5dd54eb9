/*
 * launcher.h
 *		The launcher: one worker for each database that has the extension.
 */
#ifndef SM_LAUNCHER_H
#define SM_LAUNCHER_H

extern void sm_launcher_init(void);

extern PGDLLEXPORT void softmobile_launcher_main(Datum main_arg) pg_attribute_noreturn();

#endif							/* SM_LAUNCHER_H */
