/*
 * launcher.c
 *		One worker for each database that has the extension.
 *
 * The launcher is a static background worker, started on a primary at the end of
 * recovery.  It is connected to no database, and so can read pg_database but not
 * pg_extension.  For each database that allows connections and is no template it
 * goes round
 *
 *			probe ──▶ no extension ──▶ ask again when poked, or much later
 *			  │
 *			  └─────▶ worker ──▶ its end ──▶ probe, after a delay if it died
 *
 * where probe and worker are dynamic background workers (process.c, worker.c) that
 * report through their slot in shared memory.  A database whose processes die is
 * tried again with exponential backoff; others do not notice.  Should a process
 * bring down the whole server, and again after the restart, all of them are started
 * with backoff, so that the server can be used in between.
 *
 * The launcher is woken by the postmaster when a process starts or ends, and by
 * pokes: CREATE EXTENSION, the commands of hooks.c, sync_run() without a worker.
 *
 * It does not end because it could not look at pg_database (no memory, no lock to
 * be had): the postmaster starts a process again so many seconds after its end by
 * the clock of the day, which is hours after it if the clock is set back meanwhile.
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/pg_database.h"
#include "common/pg_prng.h"
#include "miscadmin.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/proc.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/hsearch.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

#include "compat.h"
#include "guc.h"
#include "launcher.h"
#include "shmem.h"

#define LAUNCHER_RESTART_S		5

/* All in ms. */
#define NAP						60000	/* between looks at pg_database */
#define MIN_INTERVAL			1000	/* between starts for a database */
#define MAX_BACKOFF				60000
#define STABLE					60000	/* a worker that lived longer is no failure */
#define ABSENT_INTERVAL			3600000 /* until an unpoked database is asked again */
#define EXHAUSTED_INTERVAL		10000	/* while no process can be had, or no look at pg_database */
#define STARTING_PATIENCE		10000	/* a start that takes longer counts no more */

/* Processes that start at one time, of those that max_worker_processes allows. */
#define MAX_STARTING			3

typedef struct Database
{
	Oid			dbid;			/* hash key */
	char		name[NAMEDATALEN];
	bool		listed;			/* seen by the latest look at pg_database */
	bool		fit;			/* the latest probe found that a worker may run */
	bool		poked;			/* asked for since the latest start */
	int			failures;		/* processes that died in a row */
	TimestampTz launched_at;	/* latest start of a probe */
	TimestampTz next_start;		/* not before */
	BackgroundWorkerHandle *handle; /* the process that was started, or NULL */
	int			slotno;			/* this and the next: its slot */
	uint32		generation;
	SmWorkerInfo info;			/* the slot as last seen */
} Database;

static HTAB *databases = NULL;

/* Register the launcher with the postmaster; from _PG_init. */
void
sm_launcher_init(void)
{
	BackgroundWorker launcher = {0};

	/* pg_upgrade must not be disturbed. */
	if (!process_shared_preload_libraries_in_progress || IsBinaryUpgrade)
		return;

	launcher.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
	launcher.bgw_start_time = BgWorkerStart_RecoveryFinished;
	launcher.bgw_restart_time = LAUNCHER_RESTART_S;
	snprintf(launcher.bgw_library_name, sizeof(launcher.bgw_library_name), "softmobile");
	snprintf(launcher.bgw_function_name, BGW_MAXLEN, "softmobile_launcher_main");
	snprintf(launcher.bgw_name, BGW_MAXLEN, "softmobile launcher");
	snprintf(launcher.bgw_type, BGW_MAXLEN, "softmobile launcher");
	RegisterBackgroundWorker(&launcher);
}

static TimestampTz
later(TimestampTz from, int64 ms)
{
	return TimestampTzPlusMilliseconds(from, ms);
}

/* The delay after so many failures in a row: 2 s, 4 s ..., and some jitter. */
static int64
backoff(int failures)
{
	int64		ms = Min((int64) 1000 << Min(failures, 10), MAX_BACKOFF);

	return ms / 2 + (int64) (pg_prng_double(&pg_global_prng_state) * ms / 2);
}

/* Note one failure more, and when to try again. */
static void
put_off(Database *db, TimestampTz now)
{
	db->failures++;
	db->next_start = later(now, backoff(db->failures));
}

/* The entry of a database, made now if need be. */
static Database *
enter_database(Oid dbid)
{
	bool		found;
	Database   *db = hash_search(databases, &dbid, HASH_ENTER, &found);

	if (!found)
	{
		memset(db, 0, sizeof(*db));
		db->dbid = dbid;
	}
	return db;
}

/* Bring the table of databases up to date with pg_database. */
static void
list_databases(void)
{
	HASH_SEQ_STATUS status;
	Database   *db;
	Relation	rel;
	TableScanDesc scan;
	HeapTuple	tuple;
	Oid			dbid;

	hash_seq_init(&status, databases);
	while ((db = hash_seq_search(&status)) != NULL)
		db->listed = false;

	StartTransactionCommand();
	(void) GetTransactionSnapshot();
	rel = table_open(DatabaseRelationId, AccessShareLock);
	scan = table_beginscan_catalog(rel, 0, NULL);
	while (HeapTupleIsValid(tuple = heap_getnext(scan, ForwardScanDirection)))
	{
		Form_pg_database form = (Form_pg_database) GETSTRUCT(tuple);

		/* A template is no shop, and must stay free to be copied. */
		if (!form->datallowconn || form->datistemplate || database_is_invalid_form(form))
			continue;

		db = enter_database(form->oid);
		strlcpy(db->name, NameStr(form->datname), NAMEDATALEN);
		db->listed = true;
	}
	table_endscan(scan);
	table_close(rel, AccessShareLock);
	CommitTransactionCommand();

	/* Commands may have left slots of databases that are not, or no more, ours. */
	for (int i = 0; sm_shmem_slot_database(i, &dbid); i++)
	{
		if (OidIsValid(dbid))
			(void) enter_database(dbid);
	}
}

/* The same; false: it failed, and the table says nothing. */
static bool
try_to_list_databases(void)
{
	volatile bool listed = false;

	PG_TRY();
	{
		list_databases();
		listed = true;
	}
	PG_CATCH();
	{
		MemoryContextSwitchTo(TopMemoryContext);
		EmitErrorReport();
		AbortCurrentTransaction();
		FlushErrorState();
	}
	PG_END_TRY();
	MemoryContextSwitchTo(TopMemoryContext);
	return listed;
}

/* The process of a database has ended: what follows from the way it did? */
static void
note_end(Database *db, TimestampTz now)
{
	TimestampTz soon = Max(now, later(db->launched_at, MIN_INTERVAL));

	pfree(db->handle);
	db->handle = NULL;
	if (db->info.starting)		/* it never got as far as its slot */
	{
		sm_shmem_worker_unstart(db->slotno, db->generation, SM_VERDICT_DIED);
		db->info.starting = false;
		db->info.stopped = false;
		db->info.verdict = SM_VERDICT_DIED;
	}

	db->fit = false;
	if (db->info.stopped)
		db->next_start = soon;
	else if (db->info.verdict == SM_VERDICT_FIT)
	{
		db->fit = true;
		db->next_start = now;
	}
	else if (db->info.verdict == SM_VERDICT_LEFT)
		db->next_start = soon;
	else if (db->info.verdict == SM_VERDICT_NO_EXTENSION)
	{
		db->failures = 0;
		db->next_start = later(now, ABSENT_INTERVAL);
		sm_shmem_forget(db->dbid);
	}
	else
	{
		if (TimestampDifferenceExceeds(db->launched_at, now, STABLE))
			db->failures = 0;
		put_off(db, now);
	}
}

/* See what has become of a database; true while its process is starting. */
static bool
check_database(Database *db, TimestampTz now)
{
	pid_t		pid;
	bool		ended;

	/* The process first: once it has ended, its slot says the last of it. */
	ended = db->handle != NULL &&
		GetBackgroundWorkerPid(db->handle, &pid) == BGWH_STOPPED;
	if (sm_shmem_take_poke(db->dbid, &db->info))
		db->poked = true;
	if (ended)
		note_end(db, now);
	return db->handle != NULL && !db->info.ready &&
		!TimestampDifferenceExceeds(db->launched_at, now, STARTING_PATIENCE);
}

/* Start a probe, or the worker if the probe is done. */
static void
start_process(Database *db, TimestampTz now)
{
	static bool exhausted = false;
	BackgroundWorker process = {0};

	db->slotno = sm_shmem_worker_start(db->dbid, &db->generation);
	if (db->slotno == SM_SLOT_HELD)
		return;					/* the release will poke us */

	process.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
	process.bgw_start_time = BgWorkerStart_RecoveryFinished;
	process.bgw_restart_time = BGW_NEVER_RESTART;
	process.bgw_notify_pid = MyProcPid;
	process.bgw_main_arg = Int32GetDatum(db->slotno);
	memcpy(process.bgw_extra, &db->generation, sizeof(db->generation));
	snprintf(process.bgw_library_name, sizeof(process.bgw_library_name), "softmobile");
	snprintf(process.bgw_function_name, BGW_MAXLEN, "%s",
			 db->fit ? "softmobile_worker_main" : "softmobile_probe_main");
	snprintf(process.bgw_name, BGW_MAXLEN, "softmobile %s for database %s",
			 db->fit ? "worker" : "probe", db->name);
	snprintf(process.bgw_type, BGW_MAXLEN, "softmobile %s", db->fit ? "worker" : "probe");

	if (db->slotno == SM_SLOT_NONE ||
		!RegisterDynamicBackgroundWorker(&process, &db->handle))
	{
		db->handle = NULL;
		db->next_start = later(now, EXHAUSTED_INTERVAL);
		if (db->slotno != SM_SLOT_NONE)
			sm_shmem_worker_unstart(db->slotno, db->generation, SM_VERDICT_NO_PROCESS);
		if (!exhausted)
			ereport(LOG,
					(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
					 errmsg("out of background worker slots for database \"%s\"",
							db->name),
					 errdetail("It is tried again every %d seconds.",
							   EXHAUSTED_INTERVAL / 1000),
					 errhint("You might need to increase max_worker_processes.")));
		exhausted = true;
		return;
	}

	exhausted = false;
	db->poked = false;
	if (!db->fit)
		db->launched_at = now;
}

/* The clock was set back: what was to be started is due that much earlier. */
static void
databases_set_back(TimestampTz now, int64 us)
{
	HASH_SEQ_STATUS status;
	Database   *db;

	hash_seq_init(&status, databases);
	while ((db = hash_seq_search(&status)) != NULL)
	{
		db->next_start -= us;
		db->launched_at = Min(db->launched_at, now);
	}
}

/* Start what is due; returns when to look again. */
static TimestampTz
tend_databases(TimestampTz now, TimestampTz earliest)
{
	TimestampTz next_look = later(now, NAP);
	bool		poke_all = sm_shmem_take_poke_all();
	int			starting = 0;
	HASH_SEQ_STATUS status;
	Database   *db;

	hash_seq_init(&status, databases);
	while ((db = hash_seq_search(&status)) != NULL)
	{
		if (check_database(db, now))
			starting++;
		if (poke_all)
			db->poked = true;
	}

	hash_seq_init(&status, databases);
	while ((db = hash_seq_search(&status)) != NULL)
	{
		/* A process without handle is left from a launcher before this one. */
		if (db->handle != NULL || db->info.attached)
			continue;
		if (!db->listed)
		{
			sm_shmem_forget(db->dbid);
			(void) hash_search(databases, &db->dbid, HASH_REMOVE, NULL);
			continue;
		}
		if (db->info.held)
			continue;

		if (db->poked)
			db->next_start = Min(db->next_start,
								 Max(now, later(db->launched_at, MIN_INTERVAL)));
		if (Max(db->next_start, earliest) <= now && starting < MAX_STARTING)
		{
			start_process(db, now);
			if (db->handle != NULL)
				starting++;
		}
		if (db->handle == NULL)
			next_look = Min(next_look, Max(db->next_start, later(now, MIN_INTERVAL)));
	}
	return next_look;
}

/* Reread the settings; a new role means new workers, and another try for all. */
static void
reload_settings(void)
{
	char	   *role = pstrdup(sm_worker_role);
	bool		changed;
	HASH_SEQ_STATUS status;
	Database   *db;

	ProcessConfigFile(PGC_SIGHUP);
	changed = strcmp(role, sm_worker_role) != 0;
	pfree(role);

	hash_seq_init(&status, databases);
	while ((db = hash_seq_search(&status)) != NULL)
	{
		if (changed)
		{
			sm_shmem_stop(db->dbid);
			db->fit = false;
		}
		if (db->failures > 0)
			db->poked = true;
	}
}

/* When to start processes after crashes of the server in quick succession. */
static TimestampTz
earliest_start(void)
{
	TimestampTz now = GetCurrentTimestamp();
	int			restarts = sm_shmem_quick_restarts();
	int64		delay;

	if (restarts == 0)
		return now;
	delay = backoff(restarts);
	ereport(LOG,
			(errmsg("softmobile workers start in %d ms", (int) delay),
			 errdetail("The server has crashed in quick succession, times: %d.",
					   restarts)));
	return later(now, delay);
}

/* Main function of the launcher. */
void
softmobile_launcher_main(Datum main_arg)
{
	HASHCTL		ctl = {.keysize = sizeof(Oid),.entrysize = sizeof(Database)};
	uint32		wait_event = WaitEventExtensionNew("SoftmobileLauncher");
	TimestampTz earliest;
	TimestampTz now;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();

	sm_shmem_launcher_attach();
	BackgroundWorkerInitializeConnectionByOid(InvalidOid, InvalidOid, 0);
	MemoryContextSwitchTo(TopMemoryContext);
	databases = hash_create("softmobile databases", 16, &ctl, HASH_ELEM | HASH_BLOBS);
	earliest = earliest_start();
	now = GetCurrentTimestamp();

	for (;;)
	{
		TimestampTz next_look;
		TimestampTz before = now;

		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
		if (ConfigReloadPending)
		{
			ConfigReloadPending = false;
			reload_settings();
		}

		now = GetCurrentTimestamp();
		if (now < before)
		{
			databases_set_back(now, before - now);
			earliest -= before - now;
		}
		if (try_to_list_databases())
			next_look = tend_databases(now, earliest);
		else
			next_look = later(now, EXHAUSTED_INTERVAL);

		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 sm_shmem_time_left(next_look), wait_event);
	}
}
