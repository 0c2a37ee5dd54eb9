/*
 * shmem.c
 *		Which process works for which database; wake-ups; and the creation of all
 *		shared memory of softmobile (the run requests live in request.c).
 *
 * It exists when the library is in shared_preload_libraries, and holds hints
 * only: losing all of it in a crash loses no event.  Knows neither SQL nor HTTP.
 *
 * Locking protocol.  One LWLock of the tranche "softmobile" guards every field of
 * SmShared but two atomics.  It is held for a look at a few dozen slots, and across
 * no system call but kill() and the write that SetLatch() may need.  The atomics
 * keep selling backends off the lock:
 *
 *	 assignments	grows whenever a slot gets or loses its database; a backend
 *					keeps the slot it found for as long as the number stands.
 *					Written under the lock, read without.
 *	 work			one flag per slot: "a wake-up is under way".  See
 *					sm_shmem_poke_events() for why none gets lost.
 *
 * The lock of request.c may be held when this one is taken, never the reverse.
 *
 * PGPROC pointers are valid for as long as the lock is held and the field is set:
 * a process clears its own, under the lock, before it gives up its PGPROC.  No
 * process cleans up after another; the postmaster wipes all of it after a crash.
 */
#include "postgres.h"

#include <signal.h>

#include "miscadmin.h"
#include "port/atomics.h"
#include "storage/condition_variable.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/lwlock.h"
#include "storage/proc.h"
#include "storage/shmem.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

#include "compat.h"
#include "request.h"
#include "shmem.h"

#define TRANCHE_NAME "softmobile"

/* A server that lived shorter than this before it crashed restarted quickly. */
#define QUICK_RESTART_MS (5 * 60 * 1000)

/*
 * A database that has, or may have, a process of ours.  Every field but work is
 * guarded by SmShared.lock.
 */
typedef struct SmSlot
{
	pg_atomic_uint32 work;		/* 1: the worker is being woken, or new events do not matter to it */
	Oid			dbid;			/* InvalidOid: the slot is free */
	uint32		generation;		/* number of starts; a straggler's is too low */
	bool		starting;		/* registered with the postmaster, not attached */
	PGPROC	   *proc;			/* the attached process, or NULL */
	pid_t		pid;			/* of proc */
	bool		ready;			/* proc is a worker that takes requests */
	bool		stopped;		/* the latest process was asked to leave */
	bool		reported;		/* the latest process has set the verdict */
	bool		poked;			/* the launcher shall look at this database */
	int			holders;		/* commands that need the database to themselves */
	SmProbed	probed;			/* from the latest probe */
	SmVerdict	verdict;		/* of the latest process that gave one */
	TimestampTz started_at;		/* when proc attached */
} SmSlot;

typedef struct SmShared
{
	PGPROC	   *launcher;		/* lock: the launcher, or NULL */
	bool		poked_all;		/* lock: the launcher shall look everywhere */
	int			quick_restarts; /* constant: crashes in quick succession */
	pg_atomic_uint32 assignments;	/* written under the lock */
	ConditionVariable changed;	/* broadcast when a process came, got ready, left */
	int			nslots;			/* constant */
	SmSlot		slots[FLEXIBLE_ARRAY_MEMBER];
} SmShared;

static SmShared *shared = NULL;
static LWLock *lock = NULL;
static SmSlot *my_slot = NULL;	/* of an attached probe or worker */

static shmem_request_hook_type prev_shmem_request_hook = NULL;
static shmem_startup_hook_type prev_shmem_startup_hook = NULL;

static void detach_worker(int code, Datum arg);
static void detach_launcher(int code, Datum arg);

/* --- creation --- */

static Size
shared_size(void)
{
	return add_size(offsetof(SmShared, slots),
					mul_size(max_worker_processes, sizeof(SmSlot)));
}

static void
request_shared(void)
{
	if (prev_shmem_request_hook)
		prev_shmem_request_hook();

	RequestAddinShmemSpace(shared_size());
	RequestAddinShmemSpace(sm_request_shmem_size());
	RequestNamedLWLockTranche(TRANCHE_NAME, 2);
}

/*
 * Count crashes that follow each other quickly.  Runs in the postmaster, whose
 * memory survives what shared memory does not.
 */
static int
count_quick_restarts(void)
{
	static TimestampTz latest = 0;
	static int	count = 0;
	TimestampTz now = GetCurrentTimestamp();

	if (latest == 0 || TimestampDifferenceExceeds(latest, now, QUICK_RESTART_MS))
		count = 0;
	else
		count++;
	latest = now;
	return count;
}

static void
startup_shared(void)
{
	bool		found;

	if (prev_shmem_startup_hook)
		prev_shmem_startup_hook();

	LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
	shared = ShmemInitStruct("softmobile", shared_size(), &found);
	lock = &GetNamedLWLockTranche(TRANCHE_NAME)[0].lock;
	if (!found)
	{
		memset(shared, 0, shared_size());
		shared->quick_restarts = count_quick_restarts();
		shared->nslots = max_worker_processes;
		pg_atomic_init_u32(&shared->assignments, 1);
		ConditionVariableInit(&shared->changed);
		for (int i = 0; i < shared->nslots; i++)
			pg_atomic_init_u32(&shared->slots[i].work, 0);
	}
	sm_request_shmem_startup(&GetNamedLWLockTranche(TRANCHE_NAME)[1].lock);
	LWLockRelease(AddinShmemInitLock);
}

/* Ask for the shared memory; from _PG_init. */
void
sm_shmem_init(void)
{
	if (!process_shared_preload_libraries_in_progress)
		return;

	prev_shmem_request_hook = shmem_request_hook;
	shmem_request_hook = request_shared;
	prev_shmem_startup_hook = shmem_startup_hook;
	shmem_startup_hook = startup_shared;
}

bool
sm_shmem_available(void)
{
	return shared != NULL;
}

/* --- helpers --- */

/* The slot of a database, or NULL.  Call with the lock held. */
static SmSlot *
find_slot(Oid dbid)
{
	for (int i = 0; i < shared->nslots; i++)
	{
		if (shared->slots[i].dbid == dbid)
			return &shared->slots[i];
	}
	return NULL;
}

/* The slot of a database, assigned now if need be; NULL when none is free. */
static SmSlot *
assign_slot(Oid dbid)
{
	SmSlot	   *slot = find_slot(dbid);
	uint32		generation;

	if (slot != NULL)
		return slot;
	slot = find_slot(InvalidOid);
	if (slot == NULL)
		return NULL;

	/* The generation goes on, so that stragglers of the last owner stay out. */
	generation = slot->generation;
	memset((char *) slot + offsetof(SmSlot, dbid), 0,
		   sizeof(SmSlot) - offsetof(SmSlot, dbid));
	slot->generation = generation;
	slot->dbid = dbid;
	pg_atomic_fetch_add_u32(&shared->assignments, 1);
	return slot;
}

/* Call with the lock held. */
static void
wake_launcher(void)
{
	if (shared->launcher != NULL)
		SetLatch(&shared->launcher->procLatch);
}

/* Call with the lock held. */
static void
stop_process(SmSlot *slot)
{
	if (slot->proc == NULL && !slot->starting)
		return;
	slot->stopped = true;
	slot->starting = false;		/* if it has not attached yet, it shall not */
	/* The process is ours and alive, else it would have cleared its entry. */
	if (slot->proc != NULL)
		(void) kill(slot->pid, SIGTERM);
}

/* How long to sleep in a loop that ends at a deadline, in ms; 0: it is over. */
long
sm_shmem_time_left(TimestampTz deadline)
{
	TimestampTz now = GetCurrentTimestamp();

	if (TimestampDifferenceExceeds(now, deadline, 60 * 1000))
		return 60 * 1000;		/* or "infinity" would overflow */
	return TimestampDifferenceMilliseconds(now, deadline);
}

/* --- wake-ups --- */

/*
 * Tell the worker of a database that there are new events.  Called at every
 * commit that captured something, after it became visible: mostly two reads of
 * shared memory.
 *
 * No wake-up is lost.  The worker clears the flag and only then looks for work
 * (sm_shmem_take_work); a caller makes its work visible and only then reads the
 * flag; both with a full barrier between.  So a caller who finds the flag set
 * precedes the clearing, and the look that follows sees his work.  A caller who
 * sets the flag himself also sets the latch, and nothing can stop him between
 * the two.  When the slot has changed hands meanwhile he wakes the new owner, in
 * vain but harmlessly: a flag without a latch would silence later callers.
 * Without a worker nothing is to do: one that attaches clears the flag and looks.
 */
void
sm_shmem_poke_events(Oid dbid)
{
	static Oid	seen_dbid = InvalidOid;
	static uint32 seen_assignments = 0;
	static SmSlot *slot = NULL;

	if (shared == NULL)
		return;

	pg_memory_barrier();
	if (dbid != seen_dbid ||
		pg_atomic_read_u32(&shared->assignments) != seen_assignments)
	{
		LWLockAcquire(lock, LW_SHARED);
		slot = find_slot(dbid);
		seen_dbid = dbid;
		seen_assignments = pg_atomic_read_u32(&shared->assignments);
		LWLockRelease(lock);
	}

	/* The read alone spares a busy flag's cache line. */
	if (slot == NULL ||
		pg_atomic_read_u32(&slot->work) != 0 ||
		pg_atomic_exchange_u32(&slot->work, 1) != 0)
		return;

	LWLockAcquire(lock, LW_SHARED);
	if (slot->proc != NULL)
		SetLatch(&slot->proc->procLatch);
	LWLockRelease(lock);
}

/* The same for whatever else the worker shall look at: it is always woken. */
void
sm_shmem_poke(Oid dbid)
{
	SmSlot	   *slot;

	if (shared == NULL)
		return;
	LWLockAcquire(lock, LW_SHARED);
	slot = find_slot(dbid);
	if (slot != NULL && slot->proc != NULL)
		SetLatch(&slot->proc->procLatch);
	LWLockRelease(lock);
}

/* Worker: look for work after this, never before; and reset the latch before. */
void
sm_shmem_take_work(void)
{
	pg_atomic_exchange_u32(&my_slot->work, 0);
}

/* Worker: until the next sm_shmem_take_work() no new event shall wake it. */
void
sm_shmem_ignore_events(void)
{
	pg_atomic_write_u32(&my_slot->work, 1);
}

/*
 * Have the launcher look at a database now: it may have got the extension.  With
 * InvalidOid, have it look at the list of databases.
 */
void
sm_shmem_poke_launcher(Oid dbid)
{
	if (shared == NULL)
		return;

	LWLockAcquire(lock, LW_EXCLUSIVE);
	if (OidIsValid(dbid))
	{
		SmSlot	   *slot = assign_slot(dbid);

		if (slot != NULL)
			slot->poked = true;
		else
			shared->poked_all = true;
	}
	wake_launcher();
	LWLockRelease(lock);
}

/* --- looking, holding, waiting: every backend --- */

static void
fill_info(const SmSlot *slot, SmWorkerInfo *info)
{
	memset(info, 0, sizeof(*info));
	if (slot == NULL)
		return;
	info->attached = slot->proc != NULL;
	info->starting = slot->starting;
	info->ready = slot->ready;
	info->stopped = slot->stopped;
	info->held = slot->holders > 0;
	info->poked = slot->poked;
	info->pid = slot->pid;
	info->role = slot->probed.role;
	info->verdict = slot->verdict;
	info->started_at = slot->started_at;
}

void
sm_shmem_worker_info(Oid dbid, SmWorkerInfo *info)
{
	memset(info, 0, sizeof(*info));
	if (shared == NULL)
		return;
	LWLockAcquire(lock, LW_SHARED);
	fill_info(find_slot(dbid), info);
	LWLockRelease(lock);
}

bool
sm_shmem_launcher_running(void)
{
	bool		running;

	if (shared == NULL)
		return false;
	LWLockAcquire(lock, LW_SHARED);
	running = shared->launcher != NULL;
	LWLockRelease(lock);
	return running;
}

/* Wait until a database's worker is ready, or not there; false at the deadline. */
static bool
wait_for_worker(Oid dbid, bool ready, TimestampTz deadline)
{
	static uint32 wait_event = 0;
	bool		reached;

	if (wait_event == 0)
		wait_event = WaitEventExtensionNew("SoftmobileWorker");

	ConditionVariablePrepareToSleep(&shared->changed);
	for (;;)
	{
		SmWorkerInfo info;
		long		timeout;

		sm_shmem_worker_info(dbid, &info);
		reached = ready ? info.ready : !info.attached;
		timeout = sm_shmem_time_left(deadline);
		if (reached || timeout <= 0)
			break;
		(void) ConditionVariableTimedSleep(&shared->changed, timeout, wait_event);
	}
	ConditionVariableCancelSleep();
	return reached;
}

bool
sm_shmem_wait_ready(Oid dbid, TimestampTz deadline)
{
	return shared != NULL && wait_for_worker(dbid, true, deadline);
}

/*
 * Keep processes of ours out of a database, and ask the one that is there to
 * leave.  True obliges to call sm_shmem_release().  False: no slot is free, so
 * that no process of ours can be there either.
 */
bool
sm_shmem_hold(Oid dbid)
{
	SmSlot	   *slot;

	if (shared == NULL)
		return false;

	LWLockAcquire(lock, LW_EXCLUSIVE);
	slot = assign_slot(dbid);
	if (slot != NULL)
	{
		slot->holders++;
		stop_process(slot);
	}
	LWLockRelease(lock);
	return slot != NULL;
}

void
sm_shmem_release(Oid dbid)
{
	SmSlot	   *slot;

	LWLockAcquire(lock, LW_EXCLUSIVE);
	slot = find_slot(dbid);
	if (slot == NULL || slot->holders <= 0)
		elog(ERROR, "database %u is not held", dbid);
	slot->holders--;
	slot->poked = true;
	wake_launcher();
	LWLockRelease(lock);
}

/* Wait until the process that was asked to leave has left; false at the deadline. */
bool
sm_shmem_wait_left(Oid dbid, TimestampTz deadline)
{
	return shared == NULL || wait_for_worker(dbid, false, deadline);
}

/* --- processes of a database --- */

/*
 * Take over the slot that the launcher filled for this process.  dbid is its
 * database, probed what the latest probe said.  False: this start has been called
 * off; exit then.
 *
 * Call before connecting to the database, so that the exit callback runs after
 * the process has left the ProcArray: who sees the slot empty can rely on
 * CountOtherDBBackends() not to find it either.
 */
bool
sm_shmem_worker_attach(int slotno, uint32 generation, Oid *dbid, SmProbed *probed)
{
	SmSlot	   *slot = &shared->slots[slotno];
	bool		attached = false;

	LWLockAcquire(lock, LW_EXCLUSIVE);
	if (slot->generation == generation && slot->starting)
	{
		slot->starting = false;
		slot->reported = false;
		slot->proc = MyProc;
		slot->pid = MyProcPid;
		slot->started_at = GetCurrentTimestamp();
		pg_atomic_exchange_u32(&slot->work, 0);
		my_slot = slot;
		*dbid = slot->dbid;
		*probed = slot->probed;
		attached = true;
	}
	LWLockRelease(lock);

	if (attached)
		on_shmem_exit(detach_worker, (Datum) 0);
	return attached;
}

static void
detach_worker(int code, Datum arg)
{
	Oid			dbid = my_slot->dbid;
	bool		was_ready = my_slot->ready;

	LWLockAcquire(lock, LW_EXCLUSIVE);
	my_slot->ready = false;
	LWLockRelease(lock);

	/* Not before: whoever finds the worker ready may still post a request. */
	if (was_ready)
		sm_request_lose_all(dbid);

	LWLockAcquire(lock, LW_EXCLUSIVE);
	my_slot->proc = NULL;
	my_slot->pid = 0;
	if (!my_slot->reported && !my_slot->stopped)
		my_slot->verdict = SM_VERDICT_DIED;
	wake_launcher();
	LWLockRelease(lock);
	ConditionVariableBroadcast(&shared->changed);
}

/* The worker takes run requests from now on. */
void
sm_shmem_worker_ready(void)
{
	LWLockAcquire(lock, LW_EXCLUSIVE);
	my_slot->ready = true;
	my_slot->verdict = SM_VERDICT_NONE;
	wake_launcher();
	LWLockRelease(lock);
	ConditionVariableBroadcast(&shared->changed);
}

/* Say what the database is fit for, a probe with its findings; returns what was said last. */
SmVerdict
sm_shmem_worker_verdict(SmVerdict verdict, const SmProbed *probed)
{
	SmVerdict	previous;

	LWLockAcquire(lock, LW_EXCLUSIVE);
	previous = my_slot->verdict;
	my_slot->verdict = verdict;
	my_slot->probed = probed ? *probed : (SmProbed) {0};
	my_slot->reported = true;
	LWLockRelease(lock);
	return previous;
}

/* --- the launcher --- */

/* Become the launcher.  What a predecessor has started but not seen attach is void. */
void
sm_shmem_launcher_attach(void)
{
	LWLockAcquire(lock, LW_EXCLUSIVE);
	if (shared->launcher != NULL)
	{
		LWLockRelease(lock);
		elog(FATAL, "another softmobile launcher is running");
	}
	shared->launcher = MyProc;
	for (int i = 0; i < shared->nslots; i++)
		shared->slots[i].starting = false;
	LWLockRelease(lock);

	on_shmem_exit(detach_launcher, (Datum) 0);
}

static void
detach_launcher(int code, Datum arg)
{
	LWLockAcquire(lock, LW_EXCLUSIVE);
	shared->launcher = NULL;
	LWLockRelease(lock);
}

/* How many crashes of the server followed each other quickly. */
int
sm_shmem_quick_restarts(void)
{
	return shared->quick_restarts;
}

/* Has anybody asked for a look at all databases since the last call? */
bool
sm_shmem_take_poke_all(void)
{
	bool		poked;

	LWLockAcquire(lock, LW_EXCLUSIVE);
	poked = shared->poked_all;
	shared->poked_all = false;
	LWLockRelease(lock);
	return poked;
}

/* Look at a database's slot, and clear its poke; returns whether there was one. */
bool
sm_shmem_take_poke(Oid dbid, SmWorkerInfo *info)
{
	SmSlot	   *slot;

	LWLockAcquire(lock, LW_EXCLUSIVE);
	slot = find_slot(dbid);
	fill_info(slot, info);
	if (slot != NULL)
		slot->poked = false;
	LWLockRelease(lock);
	return info->poked;
}

/* Fill a slot for a process about to be registered; returns its number. */
int
sm_shmem_worker_start(Oid dbid, uint32 *generation)
{
	int			result = SM_SLOT_NONE;
	SmSlot	   *slot;

	LWLockAcquire(lock, LW_EXCLUSIVE);
	slot = assign_slot(dbid);
	if (slot != NULL && slot->holders > 0)
		result = SM_SLOT_HELD;
	else if (slot != NULL)
	{
		Assert(slot->proc == NULL && !slot->starting);
		slot->starting = true;
		slot->stopped = false;
		*generation = ++slot->generation;
		result = slot - shared->slots;
	}
	LWLockRelease(lock);
	return result;
}

/* The process could not be started, or ended before it attached; say why. */
void
sm_shmem_worker_unstart(int slotno, uint32 generation, SmVerdict verdict)
{
	SmSlot	   *slot = &shared->slots[slotno];

	LWLockAcquire(lock, LW_EXCLUSIVE);
	if (slot->generation == generation)
	{
		slot->starting = false;
		slot->verdict = verdict;
	}
	LWLockRelease(lock);
}

/* Ask the process of a database to leave, or not to begin. */
void
sm_shmem_stop(Oid dbid)
{
	SmSlot	   *slot;

	LWLockAcquire(lock, LW_EXCLUSIVE);
	slot = find_slot(dbid);
	if (slot != NULL)
		stop_process(slot);
	LWLockRelease(lock);
}

/* The database of a slot, or InvalidOid; false when there is no such slot. */
bool
sm_shmem_slot_database(int slotno, Oid *dbid)
{
	if (slotno >= shared->nslots)
		return false;
	LWLockAcquire(lock, LW_SHARED);
	*dbid = shared->slots[slotno].dbid;
	LWLockRelease(lock);
	return true;
}

/* A database needs no slot any more; kept if somebody is using it all the same. */
void
sm_shmem_forget(Oid dbid)
{
	SmSlot	   *slot;

	LWLockAcquire(lock, LW_EXCLUSIVE);
	slot = find_slot(dbid);
	if (slot != NULL && slot->proc == NULL && !slot->starting &&
		slot->holders == 0 && !slot->poked)
	{
		slot->dbid = InvalidOid;
		pg_atomic_fetch_add_u32(&shared->assignments, 1);
	}
	LWLockRelease(lock);
}
