/*
 * health.c
 *		Whether the database answers, for GET /health.
 *
 * A thread with a connection of its own asks the database when somebody asks us.
 * All who wait share one answer, so that health checks, which need no token, cannot
 * load the database; nobody waits longer than PATIENCE seconds, whatever the
 * database does; and a pool whose connections are all at work is not mistaken for a
 * database that is down.
 *
 * One mutex guards the counters and the last status; the connection belongs to the
 * thread.
 */
#include "database.h"

#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#define PATIENCE	2

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wanted = PTHREAD_COND_INITIALIZER;	/* asked or stopping has changed */
static pthread_cond_t done = PTHREAD_COND_INITIALIZER;	/* answered or ended has changed */
static unsigned long asked = 0;
static unsigned long answered = 0;	/* questions up to this one */
static Answer last;				/* to the latest of them; health_ask() gives out copies */
static bool stopping = false;
static bool ended = false;
static pthread_t thread;
static PGconn *conn = NULL;

static Answer
ask_database(const Options *options)
{
	PGresult   *result;
	Answer		answer;

	/* an idle connection may have broken long ago: a second try */
	for (int try = 0; try < 2; try++)
	{
		if (conn == NULL && (conn = database_connect(options)) == NULL)
			break;
		result = database_run(conn, STATEMENT_HEALTH, NULL, PATIENCE);
		if (result != NULL && PQstatus(conn) == CONNECTION_OK)
		{
			answer = database_answer(result);
			PQclear(result);
			return answer;
		}
		PQclear(result);
		PQfinish(conn);
		conn = NULL;
		if (result == NULL)
			break;
	}
	return answer_problem(503, "The database cannot be reached.");
}

static void *
serve_questions(void *arg)
{
	pthread_mutex_lock(&lock);
	while (!stopping)
	{
		unsigned long up_to = asked;
		Answer		answer;

		if (answered == up_to)
		{
			pthread_cond_wait(&wanted, &lock);
			continue;
		}
		pthread_mutex_unlock(&lock);
		answer = ask_database(arg);
		pthread_mutex_lock(&lock);
		answer_free(&last);
		last = answer;
		answered = up_to;
		pthread_cond_broadcast(&done);
	}
	ended = true;
	pthread_cond_broadcast(&done);
	pthread_mutex_unlock(&lock);
	return NULL;
}

static void
set_patience(struct timespec *until, int seconds)
{
	clock_gettime(CLOCK_REALTIME, until);
	until->tv_sec += seconds;
}

Answer
health_ask(void)
{
	struct timespec until;
	Answer		answer;
	unsigned long question;

	set_patience(&until, PATIENCE);
	pthread_mutex_lock(&lock);
	question = ++asked;
	pthread_cond_signal(&wanted);
	while (answered < question && pthread_cond_timedwait(&done, &lock, &until) == 0)
		;
	answer = answered < question ? answer_problem(503, "The database does not answer.") : answer_copy(&last);
	pthread_mutex_unlock(&lock);
	return answer;
}

bool
health_start(const Options *options)
{
	return pthread_create(&thread, NULL, serve_questions, (void *) options) == 0;
}

/* False: the thread is stuck in a connection attempt; the process's end will end it. */
bool
health_stop(void)
{
	struct timespec until;
	bool		stopped;

	set_patience(&until, 1);
	pthread_mutex_lock(&lock);
	stopping = true;
	pthread_cond_signal(&wanted);
	while (!ended && pthread_cond_timedwait(&done, &lock, &until) == 0)
		;
	stopped = ended;
	pthread_mutex_unlock(&lock);
	if (!stopped)
		return false;
	pthread_join(thread, NULL);
	PQfinish(conn);
	answer_free(&last);
	return true;
}
