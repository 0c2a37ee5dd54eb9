/*
 * pool.c
 *		Connections to the database, shared by the threads that serve clients.
 *
 * A pool, not a connection for each thread: clients are many and mostly slow, and
 * the database wants few connections.  A thread takes one when its request is
 * complete, runs one statement and gives it back; it waits for one no longer than
 * POOL_WAIT seconds.  Connections are made when they are needed, and made again
 * when they have broken.
 *
 * One mutex guards the table of connections; a connection itself belongs to the
 * thread that has taken it.
 */
#include "database.h"

#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#define POOL_WAIT			5

/* The server is to end a statement after --timeout; so much later we no longer wait for it. */
#define GRACE				2

typedef struct Slot
{
	PGconn	   *conn;			/* NULL: not connected */
	bool		taken;
} Slot;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t given_back = PTHREAD_COND_INITIALIZER;
static Slot *slots = NULL;
static int	nslots = 0;
static const Options *options = NULL;

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
drop_connection(Slot *slot)
{
	PQfinish(slot->conn);
	slot->conn = NULL;
}

/* Connected again when it is used next; not connected now is not kept. */
static void
give_back(Slot *slot)
{
	pthread_mutex_lock(&lock);
	slot->taken = false;
	pthread_cond_signal(&given_back);
	pthread_mutex_unlock(&lock);
}

/*
 * Runs a statement and returns its answer.  What fails for the moment is tried a
 * second time; a batch that was stored the first time, its receipt lost with the
 * connection, does no harm: its events are duplicates.
 */
Answer
pool_ask(Statement statement, const Parameter *parameters)
{
	Slot	   *slot = take_slot();
	Answer		answer = {0};
	bool		again = true;

	if (slot == NULL)
		return answer_problem(503, "All database connections are busy.");
	for (int try = 0; try < 2 && again; try++)
	{
		PGresult   *result;

		free(answer.body);
		if (slot->conn == NULL && (slot->conn = database_connect(options)) == NULL)
		{
			answer = answer_problem(503, "The database cannot be reached.");
			break;
		}
		result = database_run(slot->conn, statement, parameters, options->timeout + GRACE);
		answer = database_answer(result);
		again = database_may_try_again(result);
		if (result == NULL)
			drop_connection(slot);
		else if (PQstatus(slot->conn) != CONNECTION_OK)
		{
			drop_connection(slot);
			again = !database_has_answered(result);
		}
		PQclear(result);
	}
	give_back(slot);
	return answer;
}
