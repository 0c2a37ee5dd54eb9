/*
 * pool.c
 *		Connections to the database, shared by the threads that serve clients.
 *
 * A thread takes a connection, runs one statement and gives it back; it waits for
 * one no longer than POOL_WAIT seconds.  Connections are made when needed and
 * made again when they have broken; after a failed attempt the next one waits a
 * moment, so that a database that is down is not overrun.  Each statement is a
 * transaction of its own: when its result has arrived it is committed, and only
 * then is the receipt sent.
 *
 * One mutex guards the table of connections; a connection itself belongs to the
 * thread that has taken it.
 */
#include "gateway.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <libpq-fe.h>

#define POOL_WAIT			5
#define RECONNECT_WAIT_MS	500

/* In the order of Statement.  Parameters: the token's hash, the body. */
static const struct
{
	const char *name;
	const char *sql;
	int			nparams;
}			statements[] = {
	{"health", "SELECT softmobile.central_health()", 0},
	{"admit", "SELECT softmobile.central_admit($1::bytea)", 1},
	{"receive", "SELECT softmobile.central_receive($2::text, $1::bytea)", 2},
};

typedef struct Slot
{
	PGconn	   *conn;			/* NULL: not connected */
	bool		taken;
} Slot;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t given_back = PTHREAD_COND_INITIALIZER;
static Slot *slots = NULL;
static int	nslots = 0;
static struct timespec no_connect_before;	/* CLOCK_MONOTONIC */
static const Options *options = NULL;

static bool
is_before(const struct timespec *a, const struct timespec *b)
{
	return a->tv_sec < b->tv_sec || (a->tv_sec == b->tv_sec && a->tv_nsec < b->tv_nsec);
}

bool
pool_start(const Options *opts)
{
	options = opts;
	nslots = opts->connections;
	slots = calloc((size_t) nslots, sizeof(Slot));
	return slots != NULL;
}

/* Only after all threads have ended. */
void
pool_stop(void)
{
	for (int i = 0; i < nslots; i++)
		PQfinish(slots[i].conn);
	free(slots);
	slots = NULL;
	nslots = 0;
}

static Slot *
take_slot(void)
{
	Slot	   *taken = NULL;
	struct timespec until;

	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += POOL_WAIT;
	pthread_mutex_lock(&lock);
	for (;;)
	{
		/* a connected one first */
		for (int i = 0; i < nslots; i++)
			if (!slots[i].taken && (taken == NULL || slots[i].conn != NULL))
			{
				taken = &slots[i];
				if (taken->conn != NULL)
					break;
			}
		if (taken != NULL || pthread_cond_timedwait(&given_back, &lock, &until) != 0)
			break;
	}
	if (taken != NULL)
		taken->taken = true;
	pthread_mutex_unlock(&lock);
	return taken;
}

static void
give_back(Slot *slot)
{
	pthread_mutex_lock(&lock);
	slot->taken = false;
	pthread_cond_signal(&given_back);
	pthread_mutex_unlock(&lock);
}

static void
log_notice(void *arg, const PGresult *result)
{
	(void) arg;
	log_line("database: %s", PQresultErrorField(result, PG_DIAG_MESSAGE_PRIMARY));
}

static bool
run_command(PGconn *conn, const char *command)
{
	PGresult   *result = PQexec(conn, command);
	bool		done = PQresultStatus(result) == PGRES_COMMAND_OK || PQresultStatus(result) == PGRES_TUPLES_OK;

	PQclear(result);
	return done;
}

/*
 * A receipt is a promise, so commits wait for the disk whatever the role's or the
 * database's setting says.
 */
static bool
prepare_connection(PGconn *conn)
{
	char		setting[64];

	snprintf(setting, sizeof(setting), "SET statement_timeout = '%ds'", options->timeout);
	if (!run_command(conn, setting) ||
		!run_command(conn, "SELECT set_config('synchronous_commit', 'on', false)"
					 " WHERE current_setting('synchronous_commit') = 'off'"))
		return false;
	for (size_t i = 0; i < sizeof(statements) / sizeof(statements[0]); i++)
	{
		PGresult   *result = PQprepare(conn, statements[i].name, statements[i].sql, 0, NULL);
		bool		prepared = PQresultStatus(result) == PGRES_COMMAND_OK;

		PQclear(result);
		if (!prepared)
			return false;
	}
	return true;
}

/* Sees to it that a taken slot is connected; false when the database is not to be had. */
static bool
connect_slot(Slot *slot)
{
	/* what stands before dbname is overridden by the conninfo string */
	static const char *const keywords[] = {"connect_timeout", "tcp_user_timeout", "fallback_application_name", "dbname", "client_encoding", NULL};
	char		patience[16];
	const char *values[] = {"5", patience, "softmobile-gateway", options->database, "UTF8", NULL};
	struct timespec now;
	bool		too_soon;

	if (slot->conn != NULL && PQstatus(slot->conn) == CONNECTION_OK)
		return true;
	PQfinish(slot->conn);
	slot->conn = NULL;

	clock_gettime(CLOCK_MONOTONIC, &now);
	pthread_mutex_lock(&lock);
	too_soon = is_before(&now, &no_connect_before);
	pthread_mutex_unlock(&lock);
	if (too_soon)
		return false;

	/* a server that vanished without a word must not hold a client for the kernel's quarter of an hour */
	snprintf(patience, sizeof(patience), "%d", options->timeout * 1000);
	slot->conn = PQconnectdbParams(keywords, values, 1);
	if (PQstatus(slot->conn) == CONNECTION_OK)
	{
		PQsetNoticeReceiver(slot->conn, log_notice, NULL);
		if (prepare_connection(slot->conn))
			return true;
	}
	log_line("database: %s", PQerrorMessage(slot->conn));
	PQfinish(slot->conn);
	slot->conn = NULL;
	pthread_mutex_lock(&lock);
	no_connect_before = now;
	no_connect_before.tv_nsec += RECONNECT_WAIT_MS * 1000000L;
	no_connect_before.tv_sec += no_connect_before.tv_nsec / 1000000000L;
	no_connect_before.tv_nsec %= 1000000000L;
	pthread_mutex_unlock(&lock);
	return false;
}

static bool
starts_with(const char *text, const char *prefix)
{
	return strncmp(text, prefix, strlen(prefix)) == 0;
}

/* What an SQL error means over HTTP.  Details that help the sender are passed on; SQL is not. */
static Answer
answer_error(const PGresult *result)
{
	const char *state = PQresultErrorField(result, PG_DIAG_SQLSTATE);
	const char *message = PQresultErrorField(result, PG_DIAG_MESSAGE_PRIMARY);

	if (state == NULL)
		return answer_problem(503, "The database connection was lost.");
	/* our functions say by the SQLSTATE which status they mean */
	if (starts_with(state, "SM"))
		return answer_problem(atoi(state + 2), message);
	if (strcmp(state, "22021") == 0)
		return answer_problem(400, "The body is not valid UTF-8.");
	log_line("database: %s %s", state, message ? message : "");
	if (starts_with(state, "53") || starts_with(state, "57") || starts_with(state, "58") || starts_with(state, "08") ||
		starts_with(state, "40") || starts_with(state, "25") || strcmp(state, "55P03") == 0)
		return answer_problem(503, "The database cannot take events at the moment.");
	return answer_problem(500, "The central server failed; its log says why.");
}

static bool
is_worth_another_try(const PGresult *result)
{
	const char *state = PQresultErrorField(result, PG_DIAG_SQLSTATE);

	return state != NULL && starts_with(state, "40");
}

/*
 * Runs a statement and returns its answer.  Parameters go as binary, with their
 * lengths: a zero byte in a body is the server's to refuse.
 */
Answer
pool_ask(Statement statement, const unsigned char *token_hash, const char *body, size_t body_len)
{
	const char *values[2] = {(const char *) token_hash, body};
	int			lengths[2] = {SM_TOKEN_HASH_LEN, (int) body_len};
	static const int formats[2] = {1, 1};
	Slot	   *slot = take_slot();
	PGresult   *result = NULL;
	Answer		answer;

	if (slot == NULL)
		return answer_problem(503, "All database connections are busy.");
	if (!connect_slot(slot))
	{
		give_back(slot);
		return answer_problem(503, "The database cannot be reached.");
	}
	for (int try = 0; try < 2; try++)
	{
		PQclear(result);
		result = PQexecPrepared(slot->conn, statements[statement].name, statements[statement].nparams,
								values, lengths, formats, 0);
		if (is_worth_another_try(result))
			continue;
		/* A batch that may have been stored already does no harm: its events are duplicates. */
		if (PQstatus(slot->conn) == CONNECTION_OK || !connect_slot(slot))
			break;
	}
	if (PQresultStatus(result) == PGRES_TUPLES_OK && PQntuples(result) == 1 && !PQgetisnull(result, 0, 0))
	{
		char	   *text = strdup(PQgetvalue(result, 0, 0));

		answer = text ? answer_ok(text) : answer_problem(503, "Out of memory.");
	}
	else
		answer = answer_error(result);
	PQclear(result);
	give_back(slot);
	return answer;
}
