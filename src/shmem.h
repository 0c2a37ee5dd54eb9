/*
 * shmem.h
 *		Which process works for which database, and wake-ups.
 *
 * Everything here is a hint that may vanish with the server; the truth is in
 * tables.  See shmem.c for the locking protocol.
 */
#ifndef SM_SHMEM_H
#define SM_SHMEM_H

#include "datatype/timestamp.h"

/* What the latest process of a database had to say about it. */
typedef enum SmVerdict
{
	SM_VERDICT_NONE,			/* nothing yet */
	SM_VERDICT_NO_EXTENSION,	/* the extension is not in this database */
	SM_VERDICT_FIT,				/* probe: a worker may run, as SmWorkerInfo.role */
	SM_VERDICT_LEFT,			/* worker: left by its own decision, start anew */
	SM_VERDICT_DIED,			/* ended without a word */
	SM_VERDICT_NO_PROCESS,		/* max_worker_processes is exhausted */
	SM_VERDICT_ROLE_MISSING,	/* softmobile.worker_role does not exist */
	SM_VERDICT_ROLE_SUPERUSER,	/* softmobile.worker_role is a superuser */
	SM_VERDICT_ROLE_NOLOGIN,	/* the role may not log in */
	SM_VERDICT_ROLE_NO_CONNECT	/* the role may not connect to the database */
} SmVerdict;

/* What a probe found, for the worker that follows it. */
typedef struct SmProbed
{
	Oid			role;			/* to connect as */
	uint64		settings;		/* digest of the settings that it will connect with */
} SmProbed;

typedef struct SmWorkerInfo
{
	bool		attached;		/* a process (probe or worker) is there */
	bool		starting;		/* a process was registered, has not attached yet */
	bool		ready;			/* the worker is there and takes requests */
	bool		stopped;		/* the latest process was asked to leave */
	bool		held;			/* a command keeps processes out of the database */
	bool		poked;			/* somebody wants the launcher to look */
	int			pid;
	Oid			role;
	SmVerdict	verdict;
	TimestampTz started_at;
} SmWorkerInfo;

/* What sm_shmem_worker_start() says instead of a slot's number. */
#define SM_SLOT_NONE	(-1)	/* all slots belong to other databases */
#define SM_SLOT_HELD	(-2)	/* a command keeps processes out of the database */

extern void sm_shmem_init(void);
extern bool sm_shmem_available(void);

/* Every backend; without shared memory they do nothing. */
extern void sm_shmem_poke_events(Oid dbid);
extern void sm_shmem_poke(Oid dbid);
extern void sm_shmem_poke_launcher(Oid dbid);
extern void sm_shmem_worker_info(Oid dbid, SmWorkerInfo *info);
extern bool sm_shmem_launcher_running(void);
extern long sm_shmem_time_left(TimestampTz deadline);
extern bool sm_shmem_wait_ready(Oid dbid, TimestampTz deadline);

/* Commands that need a database to themselves. */
extern bool sm_shmem_hold(Oid dbid);
extern void sm_shmem_release(Oid dbid);
extern bool sm_shmem_wait_left(Oid dbid, TimestampTz deadline);

/* The worker of a database, after it has attached. */
extern void sm_shmem_take_work(void);
extern void sm_shmem_ignore_events(void);

/* Processes of a database, from their start to their end (launcher.c). */
extern bool sm_shmem_worker_attach(int slotno, uint32 generation, Oid *dbid, SmProbed *probed);
extern void sm_shmem_worker_ready(void);
extern SmVerdict sm_shmem_worker_verdict(SmVerdict verdict, const SmProbed *probed);

/* The launcher. */
extern void sm_shmem_launcher_attach(void);
extern int	sm_shmem_quick_restarts(void);
extern bool sm_shmem_take_poke_all(void);
extern bool sm_shmem_take_poke(Oid dbid, SmWorkerInfo *info);
extern int	sm_shmem_worker_start(Oid dbid, uint32 *generation);
extern void sm_shmem_worker_unstart(int slotno, uint32 generation, SmVerdict verdict);
extern bool sm_shmem_slot_database(int slotno, Oid *dbid);
extern void sm_shmem_stop(Oid dbid);
extern void sm_shmem_forget(Oid dbid);

#endif							/* SM_SHMEM_H */
