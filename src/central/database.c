/*
 * database.c
 *		One connection to the database: made, asked, understood.
 *
 * Nothing here waits without end.  statement_timeout ends what the server can end;
 * a server that does not even do that (stopped, its disk hanging, its machine gone)
 * is given up after a little more, and the connection with it.  A commit waiting
 * for a synchronous standby is given up as well, but never cancelled: a cancelled
 * wait reports success.
 *
 * A connection belongs to the thread that uses it.  After a failed attempt all
 * threads leave the database alone for a moment; that moment has its own mutex.
 */
#include "database.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define CONNECT_TIMEOUT		"5"	/* seconds, for each host of the conninfo string */
#define RECONNECT_PAUSE_MS	500

/*
 * In the order of Statement.  Parameters: the token's hash, then the body, or the
 * name and the branch.
 */
static const struct
{
	const char *name;
	const char *sql;
	int			nparams;
}			statements[] = {
	{"health", "SELECT softmobile.central_health()", 0},
	{"admit", "SELECT softmobile.central_admit($1::bytea)", 1},
	{"receive", "SELECT softmobile.central_receive($2::text, $1::bytea)", 2},
	{"verify", "SELECT softmobile.central_verify($2::text, $1::bytea)", 2},
	{"reconcile", "SELECT softmobile.central_reconcile($2::text, $1::bytea)", 2},
	{"reference", "SELECT softmobile.central_reference($1::bytea, $2::text, $3::text)", 3},
};

static pthread_mutex_t pause_lock = PTHREAD_MUTEX_INITIALIZER;
static long pause_until = 0;	/* under pause_lock; of now_ms() */

static long
now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static bool
is_paused(void)
{
	bool		paused;

	pthread_mutex_lock(&pause_lock);
	paused = now_ms() < pause_until;
	pthread_mutex_unlock(&pause_lock);
	return paused;
}

static void
set_pause(long ms)
{
	pthread_mutex_lock(&pause_lock);
	pause_until = now_ms() + ms;
	pthread_mutex_unlock(&pause_lock);
}

/* Sends what is to be sent until PQgetResult() need not wait; false: too late. */
static bool
wait_for_result(PGconn *conn, long until)
{
	for (;;)
	{
		int			unsent = PQflush(conn);
		struct pollfd ready = {.fd = PQsocket(conn), .events = unsent > 0 ? POLLIN | POLLOUT : POLLIN};
		long		left = until - now_ms();
		int			n;

		if (unsent < 0 || (unsent == 0 && !PQisBusy(conn)))
			return true;
		if (left <= 0)
			return false;
		n = poll(&ready, 1, (int) left);
		if (n == 0)
			return false;
		if ((n < 0 && errno != EINTR) || (n > 0 && !PQconsumeInput(conn)))
			return true;		/* PQgetResult() says what is wrong */
	}
}

/*
 * The last result of what has been sent, or NULL when it is too late for one.  The
 * last, not the first: the commit comes after the row, and may fail.
 */
static PGresult *
last_result(PGconn *conn, long until)
{
	PGresult   *last = NULL;

	for (;;)
	{
		PGresult   *result;

		if (!wait_for_result(conn, until))
		{
			PQclear(last);
			return NULL;
		}
		if ((result = PQgetResult(conn)) == NULL)
			return last;
		PQclear(last);
		last = result;
	}
}

static void
log_notice(void *arg, const PGresult *result)
{
	const char *message = PQresultErrorField(result, PG_DIAG_MESSAGE_PRIMARY);

	(void) arg;
	log_line("database: %s", message ? message : "notice");
}

/* Waits for what was sent, if it was; false: it failed. */
static bool
has_worked(PGconn *conn, int sent, long until)
{
	PGresult   *result = sent ? last_result(conn, until) : NULL;
	bool		worked = PQresultStatus(result) == PGRES_COMMAND_OK || PQresultStatus(result) == PGRES_TUPLES_OK;

	PQclear(result);
	return worked;
}

/*
 * A receipt is a promise, so commits wait for the disk whatever the role's or the
 * database's setting says.
 */
static bool
prepare_connection(PGconn *conn, const Options *options)
{
	long		until = now_ms() + options->timeout * 1000L;
	char		setting[64];

	if (PQsetnonblocking(conn, 1) != 0)
		return false;
	snprintf(setting, sizeof(setting), "SET statement_timeout = '%ds'", options->timeout);
	if (!has_worked(conn, PQsendQuery(conn, setting), until) ||
		!has_worked(conn, PQsendQuery(conn, "SELECT set_config('synchronous_commit', 'on', false)"
									  " WHERE current_setting('synchronous_commit') = 'off'"), until))
		return false;
	for (size_t i = 0; i < sizeof(statements) / sizeof(statements[0]); i++)
		if (!has_worked(conn, PQsendPrepare(conn, statements[i].name, statements[i].sql, 0, NULL), until))
			return false;
	return true;
}

/* A connection that is ready for database_run(); NULL: the database is not to be had. */
PGconn *
database_connect(const Options *options)
{
	/* what stands before dbname is overridden by the conninfo string */
	static const char *const keywords[] = {"connect_timeout", "tcp_user_timeout", "fallback_application_name", "dbname", "client_encoding", NULL};
	char		patience[16];
	const char *values[] = {CONNECT_TIMEOUT, patience, "softmobile-gateway", options->database, "UTF8", NULL};
	PGconn	   *conn;

	if (is_paused())
		return NULL;

	/* a server that vanished without a word must not hold a client for the kernel's quarter of an hour */
	snprintf(patience, sizeof(patience), "%d", options->timeout * 1000);
	conn = PQconnectdbParams(keywords, values, 1);
	if (PQstatus(conn) == CONNECTION_OK)
	{
		PQsetNoticeReceiver(conn, log_notice, NULL);
		if (prepare_connection(conn, options))
		{
			set_pause(0);
			return conn;
		}
	}
	log_line("database: %s", PQerrorMessage(conn));
	PQfinish(conn);
	set_pause(RECONNECT_PAUSE_MS);
	return NULL;
}

/*
 * Runs a statement, a transaction of its own.  NULL: no answer after that many
 * seconds; the connection is of no more use.  Parameters go as binary, with their
 * lengths: a zero byte in a body is the server's to refuse.
 */
PGresult *
database_run(PGconn *conn, Statement statement, const Parameter *parameters, int seconds)
{
	const char *values[SM_MAX_PARAMETERS];
	int			lengths[SM_MAX_PARAMETERS];
	static const int formats[SM_MAX_PARAMETERS] = {1, 1, 1};
	long		until = now_ms() + seconds * 1000L;

	for (int i = 0; i < statements[statement].nparams; i++)
	{
		values[i] = parameters[i].data;
		lengths[i] = (int) parameters[i].len;
	}
	if (!PQsendQueryPrepared(conn, statements[statement].name, statements[statement].nparams, values, lengths, formats, 0))
		return PQmakeEmptyPGresult(conn, PGRES_FATAL_ERROR);
	return last_result(conn, until);
}

bool
database_has_answered(const PGresult *result)
{
	return PQresultStatus(result) == PGRES_TUPLES_OK && PQntuples(result) == 1 && !PQgetisnull(result, 0, 0);
}

static bool
starts_with(const char *text, const char *prefix)
{
	return strncmp(text, prefix, strlen(prefix)) == 0;
}

/* Serialization failures and deadlocks are nobody's fault. */
bool
database_may_try_again(const PGresult *result)
{
	const char *state = PQresultErrorField(result, PG_DIAG_SQLSTATE);

	return state != NULL && starts_with(state, "40");
}

/*
 * What an SQL error means over HTTP.  Our functions say it themselves, by SQLSTATE
 * SM and the status.  Of what else goes wrong, class 22 and 54 depend on the data:
 * as 400 and 413 they make the branch send the batch in halves and single out the
 * event that does it, where a 500 would hold up all others behind it.
 */
static Answer
answer_error(const PGresult *result)
{
	const char *state = PQresultErrorField(result, PG_DIAG_SQLSTATE);
	const char *message = PQresultErrorField(result, PG_DIAG_MESSAGE_PRIMARY);
	static const char *const passing[] = {"08", "25", "40", "53", "55P03", "57", "58"};

	if (state == NULL)
		return answer_problem(503, "The database connection was lost.");
	if (starts_with(state, "SM"))
	{
		int			status = atoi(state + 2);

		return answer_problem(status >= 400 && status <= 599 ? status : 500, message);
	}
	if (strcmp(state, "22021") == 0)
		return answer_problem(400, "The request is not valid UTF-8, or has a zero byte.");

	/* messages of class 22 repeat the data that they are about, which is nothing for a log */
	log_line("database: %s %s", state, message && !starts_with(state, "22") ? message : "");
	if (starts_with(state, "22"))
		return answer_problem(400, "The database cannot read this request.");
	if (starts_with(state, "54"))
		return answer_problem(413, "The request is too large for the database.");
	for (size_t i = 0; i < sizeof(passing) / sizeof(passing[0]); i++)
		if (starts_with(state, passing[i]))
			return answer_problem(503, "The database cannot serve this at the moment.");
	return answer_problem(500, "The central server failed; its log says why.");
}

Answer
database_answer(const PGresult *result)
{
	char	   *text;

	if (result == NULL)
		return answer_problem(503, "The database does not answer.");
	if (!database_has_answered(result))
		return answer_error(result);
	text = strdup(PQgetvalue(result, 0, 0));
	return text ? answer_ok(text) : answer_problem(503, "Out of memory.");
}
