/*
 * worker.c
 *		The sync worker of a database: delivers its outbox to the central server.
 *
 * Started by the launcher, one for each database that has the extension.  One
 * loop over two sources of events: the latch (a sale committed, somebody asked
 * for something) and libcurl's sockets, behind the one file descriptor of http.c.
 * The work itself is a pass of delivery.c.  While the worker waits it has no
 * transaction, no snapshot and no lock, so it is in nobody's way; a signal to end
 * it is obeyed at once, whatever a socket does.
 *
 * There is no PG_TRY: what is unexpected is an ERROR, which ends the process, and
 * the launcher starts another one.  All state is in tables or can be read again.
 */
#include "postgres.h"

#include "access/xact.h"
#include "compat.h"
#include "delivery.h"
#include "guc.h"
#include "http.h"
#include "miscadmin.h"
#include "outbox.h"
#include "pgstat.h"
#include "portability/instr_time.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "process.h"
#include "shmem.h"
#include "storage/latch.h"
#include "tiles.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"
#include "worker.h"

/* How often settings of the database, the token file and old segments are looked at. */
#define SETTINGS_MS			1000
#define HOUSEKEEPING_MS		60000
#define TRASH_MS			100		/* between pieces of an emptied segment that are removed */

static Oid	extension = InvalidOid;

static void
configure_http(void)
{
	SmHttpSettings settings = {
		.ca_file = sm_ca_file,
		.client_cert_file = sm_client_cert_file,
		.client_key_file = sm_client_key_file,
		.networks = sm_central_networks,
		.user_agent = "softmobile/" SOFTMOBILE_VERSION,
	};

	sm_http_configure(&settings);
}

/* Statements of the worker read by index and never wait long for a lock. */
static void
set_session(void)
{
	static const char *const settings[][2] = {
		{"search_path", "pg_catalog, pg_temp"},
		{"application_name", "softmobile worker"},
		{"synchronous_commit", "off"},
		{"default_transaction_isolation", "read committed"},
		{"default_transaction_read_only", "off"},
		{"statement_timeout", "0"},
		{"idle_in_transaction_session_timeout", "0"},
		{"lock_timeout", "5s"},
		{"enable_seqscan", "off"},
		{"enable_bitmapscan", "off"},
		{"jit", "off"},
		{"DateStyle", "ISO"},
		{"IntervalStyle", "postgres"},
	};

	for (int i = 0; i < lengthof(settings); i++)
		SetConfigOption(settings[i][0], settings[i][1], PGC_USERSET, PGC_S_OVERRIDE);
}

static void
reload_settings(void)
{
	ConfigReloadPending = false;
	ProcessConfigFile(PGC_SIGHUP);
	sm_guc_report_flags();
	configure_http();
	sm_outbox_lanes_stale();
}

/*
 * Settings that ALTER DATABASE or ALTER ROLE changes reach new sessions only; so
 * the worker ends and is started again.
 */
static void
check_settings(void)
{
	bool		changed;

	if (!sm_outbox_begin(extension))
		sm_process_leave(SM_VERDICT_LEFT);
	changed = sm_process_settings_changed();
	sm_outbox_commit();
	if (changed)
	{
		ereport(LOG,
				(errmsg("softmobile: settings of the database have changed, the worker starts anew")));
		sm_process_leave(SM_VERDICT_LEFT);
	}
}

/* An emptied segment has left files. */
static bool trash_left = false;

static void
shrink_trash(void)
{
	if (!sm_outbox_begin(extension))
		sm_process_leave(SM_VERDICT_LEFT);
	trash_left = sm_outbox_shrink_trash();
	sm_outbox_commit();
}

/* Opens and empties segments of the log; somebody reading one postpones that. */
static void
keep_house(void)
{
	if (!sm_outbox_begin(extension))
		sm_process_leave(SM_VERDICT_LEFT);
	sm_outbox_keep_house();
	sm_outbox_commit();
	shrink_trash();
}

/* Counts some of the log, for statistics. */
static void
write_tiles(void)
{
	if (!sm_outbox_begin(extension))
		sm_process_leave(SM_VERDICT_LEFT);
	sm_tiles_write();
	sm_outbox_commit();
}

static bool
is_due(TimestampTz *last, int interval_ms)
{
	TimestampTz now = GetCurrentTimestamp();

	/* A clock that was set back makes it due too. */
	if (*last != 0 && now >= *last && !TimestampDifferenceExceeds(*last, now, interval_ms))
		return false;
	*last = now;
	return true;
}

/*
 * Waits until there is something for a pass to do.  That a socket has taken or
 * brought a little more of a body is not: on a slow link there would be hundreds
 * of passes for one batch.
 */
static void
wait_for_work(uint32 wait_event)
{
	long		patience = Min(sm_delivery_timeout_ms(), sm_tiles_timeout_ms());
	instr_time	began;
	instr_time	passed;
	int			events;

	if (trash_left)
		patience = Min(patience, TRASH_MS);
	/* not by the time of day, which may be set back */
	INSTR_TIME_SET_CURRENT(began);
	INSTR_TIME_SET_ZERO(passed);
	do
	{
		long		timeout = patience - (long) INSTR_TIME_GET_MILLISEC(passed);
		long		http_timeout = sm_http_timeout_ms();

		events = WaitLatchOrSocket(MyLatch,
								   WL_LATCH_SET | WL_SOCKET_READABLE | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
								   sm_http_fd(), http_timeout >= 0 ? Min(timeout, http_timeout) : timeout, wait_event);
		sm_http_run();
		INSTR_TIME_SET_CURRENT(passed);
		INSTR_TIME_SUBTRACT(passed, began);
	} while (!(events & WL_LATCH_SET) && !sm_http_has_result() &&
			 (long) INSTR_TIME_GET_MILLISEC(passed) < patience);
}

void
softmobile_worker_main(Datum main_arg)
{
	uint32		wait_event = WaitEventExtensionNew("SoftmobileWorkerMain");
	TimestampTz settings_seen = 0;
	TimestampTz house_kept = 0;
	TimestampTz trash_shrunk = 0;
	MemoryContext pass_cxt;
	SmHttpSettings none = {.user_agent = "softmobile/" SOFTMOBILE_VERSION};

	extension = sm_process_join(main_arg);
	set_session();
	sm_http_init(&none);
	configure_http();
	sm_outbox_init();
	sm_delivery_init(extension);
	sm_delivery_check_identity();
	pass_cxt = AllocSetContextCreate(TopMemoryContext, "softmobile pass", ALLOCSET_DEFAULT_SIZES);
	MemoryContextSwitchTo(pass_cxt);
	sm_guc_report_flags();
	sm_shmem_worker_ready();

	for (;;)
	{
		bool		again;

		CHECK_FOR_INTERRUPTS();
		if (ConfigReloadPending)
			reload_settings();
		pgstat_report_activity(STATE_RUNNING, "delivering");
		if (is_due(&settings_seen, SETTINGS_MS))
		{
			check_settings();
			if (sm_endpoint_token_changed())
				sm_delivery_token_changed();
		}
		if (is_due(&house_kept, HOUSEKEEPING_MS))
			keep_house();
		if (trash_left && is_due(&trash_shrunk, TRASH_MS))
			shrink_trash();
		if (sm_tiles_due())
			write_tiles();

		sm_shmem_take_work();
		again = sm_delivery_pass();
		MemoryContextReset(pass_cxt);
		pgstat_report_activity(STATE_IDLE, NULL);
		if (!again)
			wait_for_work(wait_event);
		ResetLatch(MyLatch);
	}
}
